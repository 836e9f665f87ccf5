"""Which tensor of a file is which part of the parameters.

A file has one tensor for each layer, (out, in); a leaf of ours is (in, out) and may
stack the layers. So a tensor is a view of a leaf: of one layer, transposed.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.llama.config import ModelConfig
from examples.llama.pure import Params, PureLlama


class BadWeights(ValueError):
    """A file does not have the weights of a Llama of this kind."""


_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring = 3, 80
shown = _brief.repr
"""A value of somebody's file, for a message: it may be of any size and depth."""


# By our path without the layer's number; {} is that number.
HUGGING_FACE = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
GGUF = {
    "embed/embedding": "token_embd.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}


def outline(config: ModelConfig, vocab_size: int, dtype: Any) -> Params:
    """Returns parameters without memory: each is one number, broadcast to its shape."""
    init = PureLlama(config, vocab_size).init
    shapes = jax.eval_shape(init, jax.random.key(0))
    number = np.zeros((), dtype)
    return jax.tree.map(lambda x: np.broadcast_to(number, x.shape), shapes)


def unfilled(config: ModelConfig, vocab_size: int, dtype: Any) -> Params:
    """Returns parameters in host memory (NumPy), to be written into."""
    shapes = outline(config, vocab_size, dtype)
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)


def as_tensors(params: Params, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Returns views of ``params`` (NumPy) by the file's names, with its shapes."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        full = jax.tree_util.keystr(path, simple=True, separator="/")
        layer = re.search(r"/(\d+)/", full)
        name = names[full.replace(layer[0], "/") if layer else full]
        is_kernel = full.endswith("kernel")
        if full.startswith("layers/") and not layer:
            for i, part in enumerate(leaf):
                tensors[name.format(i)] = part.T if is_kernel else part
        else:
            name = name.format(layer[1]) if layer else name
            tensors[name] = leaf.T if is_kernel else leaf
    return tensors


def check_sizes(
    config: ModelConfig,
    vocab_size: int,
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    source: Path,
) -> None:
    """Raises ``BadWeights`` for a model that is larger than what is ``found``.

    Even computing the shapes of a model with a trillion layers would take forever.
    """
    shapes = [shape for _, shape in found.values() if math.prod(shape)]
    longest = max((max(shape, default=1) for shape in shapes), default=0)
    if config.num_layers > len(found):
        raise BadWeights(
            f"{source}: asks for {config.num_layers:,} layers; there are only "
            f"{len(found):,} tensors"
        )
    sizes = {"width": config.width, "feed-forward width": config.ffn_width}
    for name, size in {**sizes, "vocabulary": vocab_size}.items():
        if size > longest:
            raise BadWeights(
                f"{source}: asks for a {name} of {size:,}; no axis of any tensor is "
                f"longer than {longest:,}"
            )


def check_tensors(
    wanted: Mapping[str, np.ndarray],
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    promised: Mapping[str, Path],
    source: Path,
) -> None:
    """Raises ``BadWeights`` unless exactly the wanted tensors are there.

    Args:
      found: File and shape of each tensor in ``source``.
      promised: The files that an index names.
    """
    faults = [
        f"{promised.get(name, source)}: tensor {name} is missing"
        for name in wanted.keys() - found.keys()
    ]
    for name, (file, shape) in found.items():
        if name not in wanted:
            faults.append(f"{file}: tensor {name} {shape} is no part of this Llama")
        elif shape != wanted[name].shape:
            faults.append(
                f"{file}: tensor {name} is {shape}, should be {wanted[name].shape}"
            )
    if faults:
        faults.sort()
        more = f"\n... and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise BadWeights("\n".join(faults[:8]) + more)


def fill(part: np.ndarray, values: np.ndarray, file: Path, name: str) -> None:
    """Writes ``values`` into ``part``; ``BadWeights`` if that makes it not finite."""
    with np.errstate(over="ignore"):
        part[...] = values
    if not np.isfinite(part).all():
        raise BadWeights(
            f"{file}: tensor {name} is not finite in {part.dtype.name}: it has NaN, "
            "infinity or values too large for that"
        )
