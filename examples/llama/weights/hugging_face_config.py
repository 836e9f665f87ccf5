"""``config.json`` of a LlamaForCausalLM, read and written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.llama import files
from examples.llama.config import ModelConfig
from examples.llama.weights.names import BadWeights, shown

ARCHITECTURE = "LlamaForCausalLM"
TOKEN_IDS = "bos_token_id", "eos_token_id", "pad_token_id"
# What this model computes, where a setting would have it compute something else; the
# first is what a file without the setting means. Settings that are not here decide
# nothing about the logits, or come with tensors that have no place.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
}
_ROPE_COMPUTED: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1,),
}


def read_config(file: Path) -> tuple[ModelConfig, int]:
    """Returns the model's shape and vocabulary size; ``BadWeights`` if unsupported.

    Files of transformers 4 and 5, with different rotary settings, are read.
    """
    found = files.read_json(file)
    architectures = found.get("architectures") or [ARCHITECTURE]
    if found.get("model_type") != "llama" or architectures != [ARCHITECTURE]:
        raise BadWeights(
            f"{file}: model_type {shown(found.get('model_type'))}, architectures "
            f"{shown(architectures)}; only llama, {ARCHITECTURE}, can be read"
        )
    _require_computed(file, "", found, _COMPUTED)
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadWeights(f"{file}: rope: {shown(rope)} is not a JSON object")
    _require_rope_computed(file, rope)
    numbers = _Numbers(file, found)
    width, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    head_dim, tied = numbers.get("head_dim"), found.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise BadWeights(
            f"{file}: tie_word_embeddings is {shown(tied)}, not true or false"
        )
    if head_dim is not None and head_dim * heads != width:
        raise BadWeights(
            f"{file}: head_dim {head_dim}; this model computes hidden_size / "
            f"num_attention_heads = {width} / {heads} alone"
        )
    rope_base = rope.get("rope_theta", found.get("rope_theta", 1e4))
    settings = {
        "ffn_width": numbers["intermediate_size"],
        "num_layers": numbers["num_hidden_layers"],
        "num_kv_heads": numbers.get("num_key_value_heads"),
        "norm_eps": numbers.decimal("rms_norm_eps", found.get("rms_norm_eps", 1e-6)),
        "rope_base": numbers.decimal("rope_theta", rope_base),
    }
    vocab_size = numbers["vocab_size"]
    try:
        config = ModelConfig(
            width=width, num_heads=heads, tie_embeddings=tied, **settings
        )
    except ValueError as error:
        raise BadWeights(f"{file}: {error}") from error
    return config, vocab_size


def read_context(file: Path) -> int | None:
    """Returns the longest text that the model was made for."""
    return _Numbers(file, files.read_json(file)).get("max_position_embeddings")


def read_token_ids(
    file: Path, vocab_size: int, names: Sequence[str] = TOKEN_IDS
) -> dict[str, Any]:
    """Returns what ``config.json`` or ``generation_config.json`` says of tokens.

    A value is as in the file: an id, None, or a list of ids that end a text. Raises
    ``BadWeights`` for anything that is not an id of the model.
    """
    found = files.read_json(file)
    ids = {name: found[name] for name in names if name in found}
    for name, value in ids.items():
        for one in listed(value) or [0]:
            # -1 was once written where there is no padding.
            least = -1 if name == "pad_token_id" else 0
            if type(one) is not int or not least <= one < vocab_size:
                raise BadWeights(
                    f"{file}: {name} is {shown(value)}; the model's ids are 0 to "
                    f"{vocab_size - 1:,}"
                )
    return ids


def listed(ids: Any) -> list[Any]:
    """Returns a list of ids for None, one id or several ids in such a file."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


class _Numbers:
    """The settings that every model needs."""

    def __init__(self, file: Path, found: dict[str, Any]):
        self._file, self._found = file, found

    def __getitem__(self, name: str) -> int:
        value = self._found.get(name)
        if type(value) is not int or value < 1:
            raise BadWeights(
                f"{self._file}: {name} is {shown(value)}, not a positive count"
            )
        return value

    def get(self, name: str) -> int | None:
        return None if self._found.get(name) is None else self[name]

    def decimal(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise BadWeights(f"{self._file}: {name} is {shown(value)}, not a number")
        return value


def _require_rope_computed(file: Path, rope: dict[str, Any]) -> None:
    _require_computed(file, "rope: ", rope, _ROPE_COMPUTED)
    for name in rope.keys() - {"rope_theta", *_ROPE_COMPUTED}:
        raise BadWeights(
            f"{file}: rope: {name} is {shown(rope[name])}; this model does not scale "
            "rotary positions"
        )


def _require_computed(
    file: Path, prefix: str, found: dict[str, Any], computed: dict[str, tuple[Any, ...]]
) -> None:
    for name, values in computed.items():
        if found.get(name, values[0]) not in values:
            raise BadWeights(
                f"{file}: {prefix}{name} is {shown(found[name])}; this model computes "
                f"{values[0]!r} alone"
            )


def config_json(
    config: ModelConfig,
    vocab_size: int,
    *,
    dtype: str,
    context: int,
    token_ids: Mapping[str, Any],
) -> str:
    """Returns what transformers 4 or 5 needs to make this model."""
    found = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": context,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
        "torch_dtype": dtype,
    }
    return json.dumps(found, indent=2) + "\n"
