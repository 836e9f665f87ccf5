"""``config.json`` of a LlamaForCausalLM, read and written."""

import json
from pathlib import Path
from typing import Any

from examples.llama.config import ModelConfig
from examples.llama.weights.names import BadWeights

ARCHITECTURE = "LlamaForCausalLM"
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
    """The model's shape and the vocabulary's size; ``BadWeights`` if it is not ours.

    Files of transformers 4 and 5 are read, which keep the rotary settings apart.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadWeights(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadWeights(f"{file}: not a JSON object")
    architectures = found.get("architectures") or [ARCHITECTURE]
    if found.get("model_type") != "llama" or architectures != [ARCHITECTURE]:
        raise BadWeights(
            f"{file}: model_type {found.get('model_type')!r}, architectures "
            f"{architectures}; only llama, {ARCHITECTURE}, can be read"
        )
    _require_computed(file, "", found, _COMPUTED)
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    _require_rope_computed(file, rope)
    numbers = _Numbers(file, found)
    width, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    head_dim = found.get("head_dim")
    if head_dim is not None and head_dim * heads != width:
        raise BadWeights(
            f"{file}: head_dim {head_dim}; this model computes hidden_size / "
            f"num_attention_heads = {width} / {heads} alone"
        )
    try:
        config = ModelConfig(
            width=width,
            ffn_width=numbers["intermediate_size"],
            num_layers=numbers["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=found.get("num_key_value_heads"),
            tie_embeddings=bool(found.get("tie_word_embeddings", False)),
            norm_eps=found.get("rms_norm_eps", 1e-6),
            rope_base=rope.get("rope_theta", found.get("rope_theta", 1e4)),
        )
    except (ValueError, TypeError) as error:
        raise BadWeights(f"{file}: {error}") from error
    return config, numbers["vocab_size"]


class _Numbers:
    """Settings without which there is no model."""

    def __init__(self, file: Path, found: dict[str, Any]):
        self._file, self._found = file, found

    def __getitem__(self, name: str) -> int:
        value = self._found.get(name)
        if not isinstance(value, int) or value < 1:
            raise BadWeights(f"{self._file}: {name} is {value!r}, not a positive count")
        return value


def _require_rope_computed(file: Path, rope: dict[str, Any]) -> None:
    _require_computed(file, "rope: ", rope, _ROPE_COMPUTED)
    for name in rope.keys() - {"rope_theta", *_ROPE_COMPUTED}:
        raise BadWeights(
            f"{file}: rope: {name} is {rope[name]!r}; this model does not scale "
            "rotary positions"
        )


def _require_computed(
    file: Path, prefix: str, found: dict[str, Any], computed: dict[str, tuple[Any, ...]]
) -> None:
    for name, values in computed.items():
        if found.get(name, values[0]) not in values:
            raise BadWeights(
                f"{file}: {prefix}{name} is {found[name]!r}; this model computes "
                f"{values[0]!r} alone"
            )


def config_json(
    config: ModelConfig,
    vocab_size: int,
    *,
    dtype: str,
    context: int,
    end_of_text: int | None,
) -> str:
    """What transformers, 4 or 5, needs to make this model."""
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
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
    }
    return json.dumps(found, indent=2) + "\n"
