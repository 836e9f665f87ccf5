"""Mathematics of one matrix, and of numbers; knows nothing of trees or optimizers."""
