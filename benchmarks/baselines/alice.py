"""Alice: Adam in a subspace that is switched, with the residual scaled by column.

Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher
Approximation with a Low-Rank Extension" (2025), arXiv 2502.07752.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices
from benchmarks.baselines.fira import limit_growth


class MatrixState(NamedTuple):
    """`p r + 2 r q + q + 1` numbers, and `r^2` more with tracking.

    Table 1 has these except for the norm.
    """

    projector: jax.Array  # The paper's U, with orthonormal columns, (p, r).
    tracked: jax.Array | None  # Average of `U.T G G.T U`, (r, r).
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)
    squares: jax.Array  # Average of the squared norms of the residual's columns, (q,).
    norm: jax.Array  # Of the residual's part of the last direction, before factors.


class AliceState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` for every matrix.


def scale_by_alice(
    rank,
    b1=0.9,
    b2=0.9,
    b3=0.999,
    eps=1e-8,
    update_proj_gap=200,
    leading=40,
    scale=0.3,
    compensation=0.4,
    limiter=1.01,
    seed=0,
) -> optax.GradientTransformation:
    """Algorithm 4 of the paper, without its rate lambda; `b3=0` is its Alice-0.

    The projector changes at the first step and at each multiple of `update_proj_gap`
    (`switch`), and no average is rotated with it. The averages have no bias correction.
    The residual `G - U U.T G` is divided by an average of its columns' norms and
    multiplied by `sqrt(p - r)` (Algorithm 3). The norm of that grows by a factor of
    `limiter` per step at most. The paper's matrices have the smaller side first, so
    tall ones are transposed, and a column runs along the smaller side.

    `scale` and `compensation` are the paper's alpha and alpha_c. Its `leading` is 40 at
    ranks 128 and 256, and 160 at rank 512. `leading` is less if the rank is, and more
    if the complement has too few columns for the others. `eps`, which the paper does
    not have, is added to both roots.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            return MatrixState(
                # Of the paper's zeros, a QR decomposition would be arbitrary.
                projector=jnp.eye(p, r),
                tracked=jnp.zeros((r, r)) if b3 else None,
                mu=jnp.zeros((r, q)),
                nu=jnp.zeros((r, q)),
                squares=jnp.zeros(q),
                norm=jnp.zeros([]),
            )

        return AliceState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1
        due = (count == 1) | (count % update_proj_gap == 0)

        @_matrices.oriented
        def update_one(g, matrix, key):
            _, tracked, mu, nu, squares, norm = matrix

            def refresh(old):
                covariance = (1 - b3) * g @ g.T
                if tracked is not None:
                    covariance += b3 * old @ tracked @ old.T
                return switch(covariance, old, leading, key)

            projector = jax.lax.cond(due, refresh, lambda old: old, matrix.projector)
            low = projector.T @ g
            if tracked is not None:
                tracked = b3 * tracked + (1 - b3) * low @ low.T
            mu = b1 * mu + (1 - b1) * low
            nu = b2 * nu + (1 - b2) * jnp.square(low)
            residual = g - projector @ low
            squares = b1 * squares + (1 - b1) * jnp.sum(jnp.square(residual), axis=0)
            p, r = projector.shape
            extra = (p - r) ** 0.5 * residual / (jnp.sqrt(squares) + eps)
            extra, norm = limit_growth(extra, norm, limiter)
            direction = projector @ (mu / (jnp.sqrt(nu) + eps)) + compensation * extra
            new = MatrixState(projector, tracked, mu, nu, squares, norm)
            return scale * direction, new

        key = jax.random.fold_in(jax.random.key(seed), count)
        direction, new = _matrices.map_matrices(
            update_one,
            updates,
            state.matrices,
            optax.tree.split_key_like(key, updates),
        )
        return direction, AliceState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)


def switch(covariance, old, leading, key):
    """Subspace switching (Algorithm 2), with one subspace iteration (Algorithm 10).

    The `leading` eigenvectors that the iteration from `old` finds stay. The other
    columns are drawn from an orthonormal basis of the complement of all it finds.
    """
    p, r = old.shape
    leading = max(min(leading, r), 2 * r - p)
    basis, _ = jnp.linalg.qr(covariance @ old)
    _, vectors = jnp.linalg.eigh(basis.T @ covariance @ basis)
    found = basis @ vectors[:, ::-1]  # By descending eigenvalue.
    complement = jnp.linalg.qr(found, mode="complete")[0][:, r:]
    drawn = jax.random.permutation(key, complement, axis=1)[:, : r - leading]
    return jnp.concatenate([found[:, :leading], drawn], axis=1)
