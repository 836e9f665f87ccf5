"""Published memory-saving optimizers to compare with, from their papers' equations.

They are optax transforms of trees of matrices.
"""
