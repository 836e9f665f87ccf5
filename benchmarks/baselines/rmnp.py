"""RMNP: Muon that divides by norms instead of orthogonalising.

Deng et al., "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based
Optimization" (2026), arXiv 2603.20527.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class RmnpState(NamedTuple):
    momentum: optax.Params  # (p, q) for every matrix.


def scale_by_rmnp(
    beta=0.95, nesterov=True, eps=1e-12, consistent_rms=None
) -> optax.GradientTransformation:
    """RMNP as in the authors' code, without rate and weight decay.

    The paper's matrices have a row for every output, those here a column. So each
    column of the momentum is divided by its norm, whichever side is the larger one.
    `nesterov` looks one step ahead, which the code does by default; the algorithm in
    the paper does not.

    `consistent_rms=None` scales the update by `sqrt(max(1, q / p))`, as the code does.
    A number scales it such that this is its root mean square for any shape.
    """

    def init_fn(params):
        _matrices.check_matrices(params)
        return RmnpState(jax.tree.map(lambda x: jnp.zeros(x.shape), params))

    def update_fn(updates, state, params=None):
        del params

        def update_one(g, momentum):
            momentum = beta * momentum + g
            ahead = g + beta * momentum if nesterov else momentum
            norms = jnp.linalg.norm(ahead, axis=0)
            scale = shape_scale(g.shape, consistent_rms)
            return scale * ahead / jnp.maximum(norms, eps), momentum

        direction, new = _matrices.map_matrices(update_one, updates, state.momentum)
        return direction, RmnpState(new)

    return optax.GradientTransformation(init_fn, update_fn)


def shape_scale(shape, consistent_rms) -> float:
    p, q = shape
    if consistent_rms is None:
        return max(1, q / p) ** 0.5
    return consistent_rms * p**0.5  # The columns of p entries have norm one.
