"""Which leaves are factored, and how: selection, plan, and the walk over leaves."""
