"""GGUF, llama.cpp's format: quantised weights, settings and tokenizer in one file."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from gguf.quants import dequantize
from tokenizers import decoders, models, pre_tokenizers, processors

from examples.llama.config import ModelConfig
from examples.llama.pure import Params
from examples.llama.weights.gguf_bounds import check_bounds
from examples.llama.weights.names import (
    GGUF,
    BadWeights,
    as_tensors,
    check_sizes,
    check_tensors,
    fill,
    outline,
    shown,
    unfilled,
)

# Special tokens by Hugging Face's names and the format's.
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}

# How a text is divided before its pairs are merged, by the name that GGUF has for it.
_SPLITS = {
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
}


class GGUFFile:
    """An open file, whose weights are read by `load`.

    Raises ``BadWeights``, which names the file and the setting or tensor.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            check_bounds(path)
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # The library has no class of its own for it.
            raise BadWeights(f"{path}: not a whole GGUF file: {error}") from error

    def config(self) -> tuple[ModelConfig, int]:
        """Returns the model's shape and the vocabulary's size."""
        self._require("general.architecture", "llama")
        self._require("split.count", 1, if_absent=1)
        self._require("llama.expert_count", 0, if_absent=0)
        for name in self._reader.fields:
            if name.startswith("llama.rope.scaling."):
                raise self._refused(name, "this model does not scale positions")
        width = self._count("llama.embedding_length")
        heads = self._count("llama.attention.head_count")
        for name in ("rope.dimension_count", "attention.key_length"):
            self._require(f"llama.{name}", width // heads, if_absent=width // heads)
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        embedding = tensors.get(GGUF["embed/embedding"])
        if embedding is None or len(embedding.shape) != 2:
            raise BadWeights(f"{self._path}: no matrix {GGUF['embed/embedding']}")
        settings = {
            "ffn_width": self._count("llama.feed_forward_length"),
            "num_layers": self._count("llama.block_count"),
            "num_kv_heads": self._count("llama.attention.head_count_kv", heads),
            "norm_eps": self._decimal("llama.attention.layer_norm_rms_epsilon"),
            "rope_base": self._decimal("llama.rope.freq_base", 1e4),
        }
        try:
            config = ModelConfig(
                width=width,
                num_heads=heads,
                # The format has no setting for it, so that a head that is equal to the
                # embedding contradicts nothing, and is one of its own.
                tie_embeddings=GGUF["head/kernel"] not in tensors,
                **settings,
            )
        except ValueError as error:
            raise BadWeights(f"{self._path}: {error}") from error
        return config, int(embedding.shape[1])

    def load(
        self, dtype: Any = "float32", *, scan_layers: bool = True
    ) -> tuple[ModelConfig, int, Params]:
        """Loads as from a Hugging Face folder, with dequantised weights."""
        config, vocab_size = self.config()
        config = dataclasses.replace(config, scan_layers=scan_layers)
        # GGUF's shapes begin with the axis that is contiguous in memory.
        found = {
            tensor.name: (self._path, tuple(map(int, tensor.shape[::-1])))
            for tensor in self._reader.tensors
        }
        check_sizes(config, vocab_size, found, self._path)
        shapes = outline(config, vocab_size, jnp.dtype(dtype))
        check_tensors(as_tensors(shapes, GGUF), found, {}, self._path)
        params = unfilled(config, vocab_size, jnp.dtype(dtype))
        wanted = as_tensors(params, GGUF)
        heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}
        for tensor in self._reader.tensors:
            weights = self._dequantized(tensor)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                weights = in_halves(weights, heads[kind])
            fill(wanted[tensor.name], weights, self._path, tensor.name)
        return config, vocab_size, params

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns a byte-level BPE with the same pieces, merges and special tokens.

        It puts the begin of text before a text if the file says so.
        """
        self._require("tokenizer.ggml.model", "gpt2")
        split = self._setting("tokenizer.ggml.pre")
        if not isinstance(split, str) or split not in _SPLITS:
            raise self._refused("tokenizer.ggml.pre", f"only {', '.join(_SPLITS)}")
        try:
            return self._made_tokenizer(_SPLITS[split]())
        except BadWeights:
            raise
        except Exception as error:  # The library has no class of its own for it.
            raise BadWeights(f"{self._path}: its tokenizer: {error}") from error

    def _made_tokenizer(self, split: list[Any]) -> tokenizers.Tokenizer:
        pieces = self._setting("tokenizer.ggml.tokens")
        merges = self._setting("tokenizer.ggml.merges")
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)},
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(split)
        made.decoder = decoders.ByteLevel()
        kinds = self._setting("tokenizer.ggml.token_type")
        made.add_special_tokens(
            [
                piece
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind == gguf.TokenType.CONTROL
            ]
        )
        self._put_around(made, pieces)
        return made

    def _put_around(self, made: tokenizers.Tokenizer, pieces: list[str]) -> None:
        single, special = ["$A"], {}
        for role, place in (("bos", 0), ("eos", 2)):
            if self._setting(f"tokenizer.ggml.add_{role}_token", False):
                token = self._token(role, len(pieces))
                if token is None:
                    raise BadWeights(f"{self._path}: there is no {role} to be added")
                single.insert(place, pieces[token])
                special[pieces[token]] = token
        if special:
            made.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=list(special.items())
            )

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the content of ``tokenizer_config.json``."""
        pieces = self._setting("tokenizer.ggml.tokens")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for name, role in _ROLES.items():
            token = self._token(role, len(pieces))
            if token is not None:
                settings[f"{name}_token"] = pieces[token]
        template = self._setting("tokenizer.chat_template", None)
        return settings | ({} if template is None else {"chat_template": template})

    def about(self) -> dict[str, Any]:
        """Returns the same as for a Hugging Face folder."""
        _, vocab_size = self.config()
        ids = {name: self._token(role, vocab_size) for name, role in _ROLES.items()}
        ends = [ids["eos"], self._token("eot", vocab_size)]
        return {
            "vocab_size": vocab_size,
            "end_of_text": ids["eos"],
            "stops": [end for end in dict.fromkeys(ends) if end is not None],
            "context": self._count("llama.context_length", None),
            "token_ids": {f"{name}_token_id": token for name, token in ids.items()},
        }

    def _token(self, role: str, count: int) -> int | None:
        """Returns the id with the ``role``, below a number of ids."""
        name = f"tokenizer.ggml.{role}_token_id"
        token = self._setting(name, None)
        if token is not None and not (type(token) is int and 0 <= token < count):
            raise self._refused(name, f"the ids are 0 to {count - 1:,}")
        return token

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
        if field is None and if_absent:
            return if_absent[0]
        if field is None:
            raise BadWeights(f"{self._path}: {name} is missing")
        try:
            return field.contents()
        except UnicodeDecodeError as error:
            raise BadWeights(f"{self._path}: {name}: {error}") from error

    def _count(self, name: str, *if_absent: Any) -> Any:
        value = self._setting(name, *if_absent)
        if value not in if_absent and (type(value) is not int or value < 1):
            raise self._refused(name, "it must be a positive count")
        return value

    def _decimal(self, name: str, *if_absent: Any) -> float:
        """Returns the shortest decimal that rounds to the float32 in the file."""
        value = self._setting(name, *if_absent)
        if type(value) is not float or not math.isfinite(value):
            raise self._refused(name, "it must be a number")
        return float(str(np.float32(value)))

    def _require(self, name: str, value: Any, **if_absent: Any) -> None:
        if self._setting(name, *if_absent.values()) != value:
            raise self._refused(name, f"this model computes {value!r} alone")

    def _refused(self, name: str, why: str) -> BadWeights:
        value = shown(self._setting(name, None))
        return BadWeights(f"{self._path}: {name} is {value}; {why}")


def in_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of Q or K, (heads e, d): pair (2i, 2i + 1) becomes (i, i + e/2).

    llama.cpp rotates neighbouring features, and its files have rows in that order.
    """
    pairs = weights.reshape(heads, -1, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
