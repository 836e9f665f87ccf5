"""What one asks of a state: bytes, sharding, records, diagnostics, conversion."""
