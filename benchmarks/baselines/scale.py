"""SCALE: gradients with normalized columns, and momentum in the last layer alone.

Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining" (2025), arXiv
2506.16659.
"""

import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


def scale_by_scale(eps=1e-8) -> optax.GradientTransformation:
    """Algorithm 1 of the paper for all layers except the last; it has no state.

    A column of the paper's `(in, out)` matrices belongs to one output, as in the
    kernels here, so the norm is over axis 0. In PyTorch's `(out, in)` it is a row. As
    in the authors' code, the root mean square of a column becomes one, to which their
    rates refer. In the paper its norm does, which is a factor of `sqrt(in)` smaller.
    """

    return _matrices.stateless(lambda g: normalize_columns(g, eps))


def scale_by_scale_last_layer(b1=0.9, eps=1e-8) -> optax.GradientTransformation:
    """Algorithm 1 for the last layer: it normalizes an average of `p q` numbers.

    The average needs no bias correction, which the normalization would undo.
    """
    return optax.chain(optax.ema(b1, debias=False), scale_by_scale(eps))


def normalize_columns(x, eps):
    """Divides each column by its root mean square, or by `eps` if that is smaller."""
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=0))
    return x / jnp.maximum(rms, eps)
