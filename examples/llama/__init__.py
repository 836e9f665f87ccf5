"""Pretrain a Llama with low-rank momentum: ``python -m examples.llama train``."""
