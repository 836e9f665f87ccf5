"""Trees of parameters: paths, frameworks' boxes, axes as matrices, shardings."""
