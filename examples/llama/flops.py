"""Floating-point operations of training, and the peak of the devices that do them."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from examples.llama.config import DataConfig, ModelConfig

# Dense bfloat16 products in teraflops per second, by the makers' data sheets.
_PEAK_TFLOPS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "NVIDIA A100": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
}


def per_token(config: ModelConfig, params: Any, seq_len: int) -> float:
    """Returns the FLOPs of one token: 6 for every weight that it is multiplied by, and
    12 s d for the attention of a layer (PaLM, arXiv 2204.02311, appendix B).

    The embedding is looked up, not multiplied, and what is computed again to save
    memory does not count. A tied embedding is multiplied too, as the head.
    """
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    if "head" in params:
        weights -= math.prod(params["embed"]["embedding"].shape)
    return 6 * weights + 12 * config.num_layers * seq_len * config.width


def peak(devices: Sequence[Any], tflops: float | None = None) -> float | None:
    """Returns the peak of all `devices` together, with `tflops` for each if given."""
    if tflops is None:
        kind = devices[0].device_kind
        names = [name for name in _PEAK_TFLOPS if kind.startswith(name)]
        if not names:
            return None
        tflops = _PEAK_TFLOPS[max(names, key=len)]
    return tflops * 1e12 * len(devices)


def seconds_at_peak(
    model: ModelConfig, params: Any, data: DataConfig, tflops: float | None
) -> float | None:
    """Returns the seconds of a step at the devices' peak; None if that is unknown."""
    at_peak = peak(jax.devices(), tflops)
    if at_peak is None:
        return None
    tokens = data.batch_size * data.seq_len
    return per_token(model, params, data.seq_len) * tokens / at_peak
