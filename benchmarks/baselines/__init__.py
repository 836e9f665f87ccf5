"""Published memory-saving optimizers, written from their papers' equations, as optax
transforms of trees of matrices, to race against."""
