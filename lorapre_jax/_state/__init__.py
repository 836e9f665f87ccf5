"""What one asks of a state: bytes, shardings, records, diagnostics, conversion."""
