"""Metrics: how answers are scored. Each gives one score a sample, and sums from which the whole set's value follows."""
