"""SinkGD: gradients whose rows and columns are normalized in turn, without a state.

Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training"
(2025), arXiv 2502.06742.
"""

import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


def scale_by_sinkgd(iterations=5) -> optax.GradientTransformation:
    """Algorithms 3 and 4 of the paper, without its rate; it has no state.

    A pass normalizes the paper's rows and then its columns. Its matrices are taken to
    be PyTorch's `(out, in)`. So the paper's rows, which each belong to one output, are
    the columns of the kernels here. The order matters little, since both normalizations
    nearly hold after five passes.
    """

    return _matrices.stateless(lambda g: multi_normalize(g, iterations))


def multi_normalize(x, iterations):
    """SR-Sinkhorn: Sinkhorn's iteration on the squares, with the signs of `x`."""
    for _ in range(iterations):
        for axis in (0, 1):
            rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True))
            x = x / jnp.where(rms > 0, rms, 1)
    return x
