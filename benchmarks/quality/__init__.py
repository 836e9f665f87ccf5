"""Optimizers raced on one model and one token stream, results kept as data."""
