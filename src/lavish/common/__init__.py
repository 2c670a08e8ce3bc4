"""Foundations that every room stands on: errors, registry, config, messages, media. Importing it imports no torch."""
