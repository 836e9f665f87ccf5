"""The race: optimizers on the same models and token streams, with results as data."""
