"""GaLore: Adam in the leading subspace of a gradient, along its smaller side.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
(2024), arXiv 2403.03507. `optax.contrib.galore` projects the larger side, so it has
less state and captures less of a gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class MatrixState(NamedTuple):
    """`p r + 2 r q` numbers (Table 1)."""

    projector: jax.Array  # Leading left singular vectors of a gradient, (p, r).
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)


class GaLoreState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` at every matrix.


def scale_by_galore(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_proj_gap=200
) -> optax.GradientTransformation:
    """Algorithm 2 of the paper, without its rate eta and scale alpha.

    The projector is that of the gradient at every `update_proj_gap`-th step; Adam's
    moments are not changed with it.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            return MatrixState(jnp.zeros((p, r)), jnp.zeros((r, q)), jnp.zeros((r, q)))

        return GaLoreState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count, due = state.count + 1, state.count % update_proj_gap == 0

        @_matrices.oriented
        def update_one(g, matrix):
            projector = _matrices.projector_of(g, matrix.projector, due)
            low, mu, nu = _matrices.adam_direction(
                projector.T @ g, matrix.mu, matrix.nu, count, b1, b2, eps
            )
            return projector @ low, MatrixState(projector, mu, nu)

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, GaLoreState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)
