"""GGUF, llama.cpp's format: quantised weights, settings and tokenizer in one file."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from gguf.quants import dequantize
from tokenizers import decoders, models, pre_tokenizers

from examples.llama.config import ModelConfig
from examples.llama.pure import Params
from examples.llama.weights.names import (
    GGUF,
    BadWeights,
    as_tensors,
    check_tensors,
    unfilled,
)

# How a text is divided before its pairs are merged, by the name that GGUF has for it.
_SPLITS = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
}


class GGUFFile:
    """An open file; its weights are read when they are asked for.

    Raises ``BadWeights``, which names the file and the setting or tensor.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise BadWeights(f"{path}: not a whole GGUF file: {error}") from error

    def config(self) -> tuple[ModelConfig, int]:
        """The model's shape, and the vocabulary's size."""
        self._require("general.architecture", "llama")
        self._require("split.count", 1, if_absent=1)
        self._require("llama.expert_count", 0, if_absent=0)
        for name in self._reader.fields:
            if name.startswith("llama.rope.scaling."):
                raise self._refused(name, "this model does not scale positions")
        width = self._setting("llama.embedding_length")
        heads = self._setting("llama.attention.head_count")
        for name in ("rope.dimension_count", "attention.key_length"):
            self._require(f"llama.{name}", width // heads, if_absent=width // heads)
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if GGUF["embed/embedding"] not in tensors:
            raise BadWeights(f"{self._path}: no {GGUF['embed/embedding']}")
        try:
            config = ModelConfig(
                width=width,
                ffn_width=self._setting("llama.feed_forward_length"),
                num_layers=self._setting("llama.block_count"),
                num_heads=heads,
                num_kv_heads=self._setting("llama.attention.head_count_kv", heads),
                tie_embeddings=GGUF["head/kernel"] not in tensors,
                norm_eps=self._decimal("llama.attention.layer_norm_rms_epsilon"),
                rope_base=self._decimal("llama.rope.freq_base", 1e4),
            )
        except (ValueError, TypeError) as error:
            raise BadWeights(f"{self._path}: {error}") from error
        return config, int(tensors[GGUF["embed/embedding"]].shape[1])

    def load(
        self, dtype: Any = "float32", *, scan_layers: bool = True
    ) -> tuple[ModelConfig, int, Params]:
        """As of a Hugging Face folder; quantised weights by their values."""
        config, vocab_size = self.config()
        config = dataclasses.replace(config, scan_layers=scan_layers)
        params = unfilled(config, vocab_size, jnp.dtype(dtype))
        wanted = as_tensors(params, GGUF)
        # GGUF's shapes begin with the axis that lies closest in memory.
        found = {
            tensor.name: (self._path, tuple(map(int, tensor.shape[::-1])))
            for tensor in self._reader.tensors
        }
        check_tensors(wanted, found, {}, self._path)
        heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}
        for tensor in self._reader.tensors:
            weights = self._dequantized(tensor)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                weights = in_halves(weights, heads[kind])
            wanted[tensor.name][...] = weights
        return config, vocab_size, params

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Byte-level BPE with the same pieces, merges and special tokens."""
        self._require("tokenizer.ggml.model", "gpt2")
        split = self._setting("tokenizer.ggml.pre")
        if split not in _SPLITS:
            raise self._refused("tokenizer.ggml.pre", f"only {', '.join(_SPLITS)}")
        pieces = self._setting("tokenizer.ggml.tokens")
        merges = self._setting("tokenizer.ggml.merges")
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)},
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[split]())
        made.decoder = decoders.ByteLevel()
        kinds = self._setting("tokenizer.ggml.token_type")
        made.add_special_tokens(
            [
                piece
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind == gguf.TokenType.CONTROL
            ]
        )
        return made

    def ends(self) -> dict[str, int | None]:
        """The token that ends a text, and the longest text."""
        return {
            "end_of_text": self._setting("tokenizer.ggml.eos_token_id", None),
            "context": self._setting("llama.context_length", None),
        }

    def _dequantized(self, tensor: Any) -> np.ndarray:
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:  # The gguf library's, for some kinds.
            raise BadWeights(
                f"{self._path}: {tensor.name} is of kind {tensor.tensor_type.name}, "
                "which the gguf library does not read; convert it to F16 or Q8_0"
            ) from error

    def _setting(self, name: str, *if_absent: Any) -> Any:
        field = self._reader.get_field(name)
        if field is not None:
            return field.contents()
        if if_absent:
            return if_absent[0]
        raise BadWeights(f"{self._path}: {name} is missing")

    def _decimal(self, name: str, *if_absent: Any) -> float:
        """The shortest one that rounds to the float32 in the file: 1e-5 for eps."""
        return float(str(np.float32(self._setting(name, *if_absent))))

    def _require(self, name: str, value: Any, **if_absent: Any) -> None:
        if self._setting(name, *if_absent.values()) != value:
            raise self._refused(name, f"this model computes {value!r} alone")

    def _refused(self, name: str, why: str) -> BadWeights:
        return BadWeights(f"{self._path}: {name} is {self._setting(name)!r}; {why}")


def in_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K, (heads e, d): the pair (2i, 2i + 1) becomes (i, i + e/2).

    llama.cpp turns neighbouring features, and its files have the rows in that order.
    """
    pairs = weights.reshape(heads, -1, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
