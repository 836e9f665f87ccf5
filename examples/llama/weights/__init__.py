"""Import and export of weights."""
