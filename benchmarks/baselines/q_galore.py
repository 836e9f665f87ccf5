"""Q-GaLore: Adam in a gradient's leading subspace, with a basis in four bits.

Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
Low-Rank Gradients" (2024), arXiv 2407.08296.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices

BLOCK = 256  # The paper's block size.


class Int4(NamedTuple):
    """`scale * (code - zero)` in blocks of 256, the last of them padded with zeros."""

    codes: jax.Array  # uint8 (blocks, 128), two codes a byte
    scale: jax.Array  # float32 (blocks, 1)
    zero: jax.Array  # uint8 (blocks, 1)


class MatrixState(NamedTuple):
    projector: Int4  # Leading left singular vectors of a gradient, (p, r).
    gap: jax.Array  # Steps between refreshes of the projector.
    streak: jax.Array  # Refreshes in a row with a stable subspace.
    mu: jax.Array  # (r, q)
    nu: jax.Array  # (r, q)


class QGaLoreState(NamedTuple):
    count: jax.Array
    matrices: optax.Params  # A `MatrixState` at every matrix.


def scale_by_q_galore(
    rank, b1=0.9, b2=0.999, eps=1e-8, update_proj_gap=200, cos_threshold=0.4, patience=5
) -> optax.GradientTransformation:
    """GaLore with the quantised projector and the lazy refreshes of Q-GaLore.

    At a refresh, the subspace is stable if the cosine of the old and the new leading
    singular vector is above `cos_threshold` up to sign. At the `patience`-th stable
    refresh in a row, and at each further one, the matrix doubles its gap (never, if the
    threshold is 2). The 8-bit weights and moments of the paper are not implemented. The
    paper's factor on the direction (0.25) is the caller's, as the rate is.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            r = min(rank, p)
            gap, streak = jnp.int32(update_proj_gap), jnp.int32(0)
            mu, nu = jnp.zeros((r, q)), jnp.zeros((r, q))
            return MatrixState(quantize(jnp.zeros((p, r))), gap, streak, mu, nu)

        return QGaLoreState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        count = state.count + 1

        @_matrices.oriented
        def update_one(g, matrix):
            shape = len(g), len(matrix.mu)

            def refresh(projector, gap, streak):
                u = jnp.linalg.svd(g, full_matrices=False)[0][:, : shape[1]]
                old = dequantize(projector, shape)[:, 0]  # Zero at the first refresh.
                alike = jnp.abs(old @ u[:, 0]) > cos_threshold * jnp.linalg.norm(old)
                streak = jnp.where(alike, streak + 1, 0)
                return quantize(u), gap * jnp.where(streak >= patience, 2, 1), streak

            due = state.count % matrix.gap == 0
            projector, gap, streak = jax.lax.cond(
                due, refresh, lambda *kept: kept, *tuple(matrix)[:3]
            )
            basis = dequantize(projector, shape)
            low, mu, nu = _matrices.adam_direction(
                basis.T @ g, matrix.mu, matrix.nu, count, b1, b2, eps
            )
            return basis @ low, MatrixState(projector, gap, streak, mu, nu)

        direction, new = _matrices.map_matrices(update_one, updates, state.matrices)
        return direction, QGaLoreState(count, new)

    return optax.GradientTransformation(init_fn, update_fn)


def quantize(x) -> Int4:
    """Quantises blocks uniformly; codes 0 to 15 span their entries and zero."""
    blocks = jnp.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    low = jnp.minimum(blocks.min(axis=1, keepdims=True), 0)
    scale = (jnp.maximum(blocks.max(axis=1, keepdims=True), 0) - low) / 15
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    zero = jnp.round(-low * inverse)
    codes = jnp.clip(jnp.round(blocks * inverse) + zero, 0, 15).astype(jnp.uint8)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return Int4(packed, scale, zero.astype(jnp.uint8))


def dequantize(x: Int4, shape) -> jax.Array:
    """Returns the matrix of that shape, within half a `scale` of the original."""
    codes = jnp.stack([x.codes & 15, x.codes >> 4], axis=-1).reshape(-1, BLOCK)
    values = x.scale * (codes.astype(jnp.float32) - x.zero)
    return values.ravel()[: shape[0] * shape[1]].reshape(shape)
