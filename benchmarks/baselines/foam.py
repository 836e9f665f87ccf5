"""FOAM: Adam of the gradient's block means, with what the means lack added at once.

Wen et al., "FOAM: Blocked State Folding for Memory-Efficient LLM Training" (2025),
arXiv 2512.07112. The name stands for "Folded Optimizer with Approximate Moment".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class Moments(NamedTuple):
    """Of block means: `2 ceil(p / 2**level) q` numbers for a kernel (p, q)."""

    mu: jax.Array  # (ceil(p / 2**level), q)
    nu: jax.Array  # (ceil(p / 2**level), q)


class FoamState(NamedTuple):
    count: jax.Array
    moments: optax.Params  # A `Moments` for every matrix.


def scale_by_foam(
    level=2, scale=0.25, b1=0.9, b2=0.999, eps=1e-8, fold_squares=False
) -> optax.GradientTransformation:
    """The paper's algorithm, without rate and weight decay.

    The gradient is folded: every `2**level` consecutive entries along the input axis
    are replaced by their mean. The paper folds the last axis of an (out, in) matrix,
    which is the first one of the kernels (in, out) here. Adam's moments are those of
    the means. The residual, the gradient minus its block means, is added to the first
    moment, and its square to the second one, for the current step only. `scale` is the
    paper's alpha.

    The second moment averages the squares of the means, as in the paper. If
    `fold_squares`, it averages the block means of the squares, as in the authors' code.
    Adam's bias correction multiplies the whole direction, as in that code.
    """
    block = 2**level

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            shape = -(-x.shape[0] // block), x.shape[1]
            return Moments(jnp.zeros(shape), jnp.zeros(shape))

        return FoamState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1

        def update_one(g, moments):
            means = fold(g, block)
            squares = fold(jnp.square(g), block) if fold_squares else jnp.square(means)
            mu = b1 * moments.mu + (1 - b1) * means
            nu = b2 * moments.nu + (1 - b2) * squares
            mean, mean_square, now = (
                jnp.repeat(x, block, axis=0)[: len(g)] for x in (mu, nu, means)
            )
            residual = g - now
            rms = jnp.sqrt(mean_square + jnp.square(residual))
            t = count.astype(g.dtype)
            correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
            direction = scale * correction * (mean + residual) / (rms + eps)
            return direction, Moments(mu, nu)

        direction, moments = _matrices.map_matrices(update_one, updates, state.moments)
        return direction, FoamState(count, moments)

    return optax.GradientTransformation(init_fn, update_fn)


def fold(x, block):
    """Returns the means of blocks of rows; zeros fill up the last block."""
    padded = jnp.pad(x, ((0, -len(x) % block), (0, 0)))
    return padded.reshape(-1, block, x.shape[1]).mean(axis=1)
