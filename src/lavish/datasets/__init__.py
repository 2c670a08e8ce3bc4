"""Datasets: what lavish trains and measures on."""
