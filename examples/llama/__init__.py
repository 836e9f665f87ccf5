"""Pretrain a small Llama with low-rank momentum: ``python -m examples.llama``."""
