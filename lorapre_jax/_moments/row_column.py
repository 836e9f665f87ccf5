"""Second moments that are kept as statistics of rows and columns."""

import dataclasses

import jax.numpy as jnp

from lorapre_jax._moments.factors import RotatedRowColumn, RowColumn
from lorapre_jax._numerics.arrays import at_least_float32
from lorapre_jax._numerics.averages import blend_squares, one, unbiased_decay
from lorapre_jax._numerics.norms import inverse_root, largest, relative


@dataclasses.dataclass(frozen=True)
class RankOne:
    r"""Keeps a second moment as row and column statistics, `p + q` numbers per matrix.

    This is the estimate of Adafactor. With s and c the bias-corrected moving averages
    of the mean of `g^2` over each row and over each column,

    .. math::
      v_{ij} = \frac{s_i c_j}{\mathrm{mean}(c)}

    It is exact if `g^2` has rank one. The state holds the roots of s and c, `row` and
    `column`, in float32 at least, whatever `factor_dtype` says. It is the default of
    embeddings and heads.

    Examples:
      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> tx = lp.scale_by_lorapre_adam(rank=64, second_moment=lp.RankOne())
      >>> print(jax.eval_shape(tx.init, params).nu_factors["mlp"].row.shape)
      (512,)

    References:
      Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory
      Cost*, 2018, algorithm 2: `arXiv 1804.04235 <https://arxiv.org/abs/1804.04235>`_

    See also:
      `RotatedRankOne`, `optax.scale_by_factored_rms`; :doc:`the method </method>`.
    """

    factors_type = RowColumn
    second_weight = staticmethod(one)

    def init(self, batch_shape, p, q, rank, dtype, seed) -> RowColumn:
        del rank, seed
        dtype = at_least_float32(dtype)
        return RowColumn(
            jnp.zeros((*batch_shape, p), dtype), jnp.zeros((*batch_shape, q), dtype)
        )

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = unbiased_decay(jnp.asarray(decay, g.dtype), count)
        # Averages of squares, kept as their roots. Squares are taken relative to the
        # largest entry, so that none under- or overflows.
        scale = largest(g, *state)
        squares = jnp.square(g / scale)
        row, column = (
            scale * blend_squares(decay, old / scale, jnp.mean(squares, axis))
            for old, axis in ((state.row, 1), (state.column, 0))
        )
        return row[:, None] * relative(column)[None], RowColumn(row, column)


# The least root mean square of a direction, and of a row of the residual, relative to
# the gradient's. Gradients of low rank leave only rounding there, and no step to take.
FLOOR = 0.05


@dataclasses.dataclass(frozen=True)
class RotatedRankOne:
    r"""Keeps second moments in the basis of a first moment's left factor.

    The orthonormal left factor `B: (p, r)` of a first moment `LowRank()` comes to hold
    the leading directions of the gradients' columns, the strongest first. The
    components of a gradient along them, `B^T g: (r, q)`, and the residual of the
    factors' fit, `R: (p, q)`, have second moments of their own,

    .. math::
      v_{kj} = \frac{d_k c_j}{\mathrm{mean}(c)} \text{ of } B^T g, \qquad
      w_{ij} = \frac{s_i c_j}{\mathrm{mean}(c)} \text{ of } R

    with d, s and c the bias-corrected moving averages of the mean of `(B^T g)^2` over
    each row, of `R^2` over each row, and of `g^2` over each column: `p + q + r` numbers
    per matrix. If entries are divided one by one, a few directions with large gradients
    govern the step; here each direction has its own scale. Which side of a matrix the
    directions belong to is the choice of `MatrixAxes`: its rows. Embeddings and heads
    lose by it, with either side as rows, so their default is `RankOne()`.

    `d_k` and `s_i` also count 5 % of the root mean square of the gradient (for `s_i`,
    of its row i). So what is next to nothing, such as the rounding of gradients of low
    rank, is not blown up. (The rounding of bfloat16 factors is larger than that.)

    The state holds the roots of d, s and c, `direction`, `row` and `column`, in float32
    at least, whatever `factor_dtype` says.

    Examples:
      The default of all matrices except embeddings and heads, written out:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> tx = lp.scale_by_lorapre_adam(
      ...     rank=64, first_moment=lp.LowRank(), second_moment=lp.RotatedRankOne()
      ... )
      >>> print(jax.eval_shape(tx.init, params).nu_factors["mlp"].direction.shape)
      (64,)

    References:
      Vyas et al., *SOAP: Improving and Stabilizing Shampoo using Adam*, 2024: `arXiv
      2409.11321 <https://arxiv.org/abs/2409.11321>`_. This is its idea, on one side,
      with Adafactor's estimate, for the directions of the left factor.

    See also:
      `RankOne`; :doc:`the method </method>`; :doc:`which change brings what
      </results/why>`.
    """

    factors_type = RotatedRowColumn
    second_weight = staticmethod(one)

    def init(self, batch_shape, p, q, rank, dtype, seed) -> RotatedRowColumn:
        del seed
        dtype = at_least_float32(dtype)
        return RotatedRowColumn(
            *(jnp.zeros((*batch_shape, n), dtype) for n in (p, q, rank))
        )

    def rotated_moment(self, state, g, components, residual, decay):
        """Returns the roots of v, `(q, r)`, and of w, `(p, q)`; and the new state.

        Args:
          components: `g^T B`, `(q, r)`.
          residual: R, `(p, q)`.
          decay: hat b.
        """
        # One scale for all squares, so that none under- or overflows; components are
        # at most a root of p larger than entries of g. As it needs the residual, no
        # square is in memory while that is computed.
        scale = largest(g, residual, state.column)
        squares, of_components, of_residual = (
            jnp.square(x / scale) for x in (g, components, residual)
        )
        column, floor = jnp.mean(squares, 0), FLOOR**2
        now = RotatedRowColumn(
            row=jnp.mean(of_residual + floor * squares, 1),
            column=column,
            direction=jnp.mean(of_components, 0) + floor * jnp.mean(column),
        )
        row, column, direction = (
            blend_squares(decay, old / scale, square)
            for old, square in zip(state, now, strict=True)
        )
        shares = column * inverse_root(jnp.mean(jnp.square(column)))
        new = RotatedRowColumn(scale * row, scale * column, scale * direction)
        return (jnp.outer(shares, new.direction), jnp.outer(new.row, shares)), new
