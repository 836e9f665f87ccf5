"""How a moment is kept: frozen values that a transform takes as arguments.

A method turns a gradient into a bias-corrected moment. Each function below sees one
matrix (`Dense`, whose state is an array like it, also any other leaf); batch axes are
mapped outside.

    init(batch, p, q, rank, dtype, seed)         -> state, of matrices (*batch, p, q)
    first_moment(state, g, decay, count, seed)   -> estimate of E[g], new state
    second_moment(state, g, decay, count, seed)  -> estimate of sqrt(E[g^2]), new state

`kind` is the class of the state; `Dense` has none. `RotatedRankOne` sees the gradient
in the two parts of `split_moment` instead.

Second moments come back as their root: it has the gradient's scale, and factored ones
never form its square, which would under- or overflow sooner.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lorapre_jax._moments.factors import FactorPair, RotatedRowColumn, RowColumn
from lorapre_jax._numerics.arrays import at_least_float32, dot, random_columns
from lorapre_jax._numerics.averages import (
    blend,
    blend_squares,
    mass,
    unbiased_decay,
)
from lorapre_jax._numerics.norms import inverse_root, largest, relative, root
from lorapre_jax._numerics.online_regression import jacobi, subspace


@dataclasses.dataclass(frozen=True)
class Dense:
    """The full moment, one number per parameter, as `optax.scale_by_adam` keeps it."""

    def first_moment(self, mu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        mu = decay * mu + (1 - decay) * g
        return mu / mass(decay, count), mu

    def second_moment(self, nu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        nu = decay * nu + (1 - decay) * jnp.square(g)
        return root(nu / mass(decay, count)), nu


@dataclasses.dataclass(frozen=True)
class RankOne:
    """Second moment from row and column statistics, `p + q` numbers per matrix.

    Adafactor's estimate (Shazeer and Stern, 2018, algorithm 2): with `R_i` and `C_j`
    the moving averages of the mean of `g^2` over row i and over column j,
    `v_ij = R_i C_j / mean(R)`. It is exact where `g^2` has rank one. The state holds
    `sqrt(R)` and `sqrt(C)` in float32 at least, whatever `factor_dtype` says.
    """

    kind = RowColumn

    def init(self, batch, p, q, rank, dtype, seed) -> RowColumn:
        del rank, seed
        dtype = at_least_float32(dtype)
        return RowColumn(jnp.zeros((*batch, p), dtype), jnp.zeros((*batch, q), dtype))

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = unbiased_decay(decay, count, g.dtype)
        scale = largest(g, *state)
        squares = jnp.square(g / scale)
        row, column = (
            scale * blend_squares(decay, old / scale, jnp.mean(squares, axis))
            for old, axis in ((state.row, 1), (state.column, 0))
        )
        return row[:, None] * relative(column)[None], RowColumn(row, column)


# What a direction, or the residual, is taken to have at least of the gradient's root
# mean square. Of gradients of low rank, rounding is left there: no step to take.
FLOOR = 0.05


@dataclasses.dataclass(frozen=True)
class RotatedRankOne:
    """Second moments in the basis of the first one's left factor, `p + q + r` numbers.

    The orthonormal left factor `B: (p, r)` of a first moment `LowRank()` comes
    to hold the leading directions of the gradients' columns, the strongest first. Each
    gradient is seen as its components along them, `B^T g: (r, q)`, and the residual of
    their fit, `R: (p, q)`, and these are divided by rank-one estimates of their own,

        v_kj = D_k C_j / mean(C) for B^T g,  w_ij = S_i C_j / mean(C) for R

    with `D_k`, `S_i` and `C_j` the moving averages of the mean of `(B^T g)^2` over row
    k, of `R^2` over row i, and of `g^2` over column j. Entries divided one by one leave
    a few directions with large gradients to govern the step; here each has its own
    scale. It is the idea of SOAP (Vyas et al., 2024, arXiv 2409.11321), one-sided and
    with Adafactor's estimate, for the directions that are held. Which side of a matrix
    they are of is the choice of `MatrixAxes`: its rows. Embeddings and heads lose
    by it, with either side as rows (`benchmarks/quality`): give them `RankOne()`.

    `D_k` and `S_i` also count 5 % of the root mean square of the gradient (for `S_i`,
    of its row i), so that what is next to nothing, such as the rounding of gradients of
    low rank, is not blown up (but for bfloat16 factors, whose own is more than that).
    `D_k` is of column k of B, wherever that turns.
    The state holds root mean squares in float32 at least, whatever `factor_dtype` says.
    """

    kind = RotatedRowColumn

    def init(self, batch, p, q, rank, dtype, seed) -> RotatedRowColumn:
        del seed
        dtype = at_least_float32(dtype)
        return RotatedRowColumn(*(jnp.zeros((*batch, n), dtype) for n in (p, q, rank)))

    def rotated_moment(self, state, g, along, rest, decay, count):
        """-> estimates of the roots for `along`, `g^T B`, and `rest`, R; new state."""
        decay = unbiased_decay(decay, count, g.dtype)
        # Of `along` and the other sizes, no more than sums that may be a little larger.
        scale = largest(g, rest, state.column)
        whole, along, rest = (jnp.square(x / scale) for x in (g, along, rest))
        floor = FLOOR**2
        now = RotatedRowColumn(
            row=jnp.mean(rest, 1) + floor * jnp.mean(whole, 1),
            column=jnp.mean(whole, 0),
            direction=jnp.mean(along, 0) + floor * jnp.mean(whole),
        )
        row, column, direction = (
            blend_squares(decay, old / scale, square)
            for old, square in zip(state, now, strict=True)
        )
        shares = column * inverse_root(jnp.mean(jnp.square(column)))
        roots = jnp.outer(shares, scale * direction), jnp.outer(scale * row, shares)
        return roots, RotatedRowColumn(scale * row, scale * column, scale * direction)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A moment kept as a pair of thin factors, `m = B A`, `r (p + q)` numbers.

    At every step the factors take one subspace iteration towards `b m + (1-b) T`, in
    closed form (after LoRA-Pre, arXiv 2602.24283). With the decay
    `b (1 - b^(t-1)) / (1 - b^t)` at step t they hold the bias-corrected average itself,
    so a constant target of rank at most r gives that constant at every step. For a
    first moment the target T is `g`. A second moment follows `|g|` with decay
    `sqrt(b2)` and is read squared, so it cannot go negative (Appendix B.1), from the
    factors before the step plus `(1 - b2) g^2`.

    Attributes:
      residual_gain: Total weight, over time, of the part of a gradient that the
        factors do not take up. One (default) is what they take up has, and what every
        direction has in the full average. First moments only.

    Raises:
      ValueError: The gain is negative, infinite, or no number.
    """

    residual_gain: float = 1.0
    kind = FactorPair

    def __post_init__(self):
        gain = self.residual_gain
        if not (isinstance(gain, numbers.Real) and 0 <= gain < math.inf):
            raise ValueError(
                f"residual_gain must be a finite number of at least 0, got {gain!r}."
            )
        object.__setattr__(self, "residual_gain", float(gain))  # One way to write it.

    def init(self, batch, p, q, rank, dtype, seed) -> FactorPair:
        del seed
        left, right = (*batch, p, rank), (*batch, q, rank)
        return FactorPair(jnp.zeros(left, dtype), jnp.zeros(right, dtype))

    def first_moment(self, state, g, decay, count, seed):
        decay = unbiased_decay(decay, count, g.dtype)
        new, _ = self._step(state, g, decay, seed)
        gain = self.residual_gain / (1 - decay)
        return _with_residual(1, gain, state, new, g, decay), new

    def split_moment(self, state, g, decay, count, seed):
        """The new factors B and A; `g^T B`; and the residual of their fit,

            R = (X - B A) / (1 - b),  X = b m + (1 - b) g

        with m the old product and b the decay of the corrected average: what they leave
        of g, and what they drop of m, with the weight that either would have over all
        later steps, once t is large.
        """
        decay = unbiased_decay(decay, count, g.dtype)
        new, along = self._step(state, g, decay, seed)
        rest = _with_residual(0, 1 / (1 - decay), state, new, g, decay)
        return new, along, rest

    def second_moment(self, state, g, decay, count, seed):
        target, decay = jnp.abs(g), jnp.asarray(decay, g.dtype)
        root_decay = unbiased_decay(jnp.sqrt(decay), count, g.dtype)
        decay = unbiased_decay(decay, count, g.dtype)
        before = blend(decay, state.product, g)
        return before, self._step(state, target, root_decay, seed)[0]

    def _step(self, state, target, decay, seed) -> tuple[FactorPair, jax.Array]:
        left, right = state
        noise = random_columns(seed, *right.shape).astype(target.dtype)
        new, along = subspace(left, right, target, decay, noise)
        return FactorPair(*new), along


@dataclasses.dataclass(frozen=True)
class AlgorithmOne:
    """LoRA-Pre as published (arXiv 2602.24283, Algorithm 1); see `LowRank`.

    Factors take the damped Newton step of Theorem 3.1, from a zero left and a random
    right one. Moments are read as `b m + (1-b) T` from the factors before the step and
    divided by `1 - b^t`. What rounding may take from a Gram matrix (8 machine epsilons
    of its trace) is added to the paper's damping.

    The step is quadratic in the target, and nothing bounds it: after a gradient far
    larger than those before it the factors overshoot. Without clipping, one gradient
    times 3 / 10 / 30 / 100 is followed by updates whose root mean square is up to 0.54
    / 3.2 / 62 / 762, where it is 0.35 without it, at most 0.40 for Adam, and never
    above 0.99 for the default (`benchmarks/spike.py`: 256 x 256, rank 16, gradients of
    rank 12 and a tenth of noise). Clip the gradients, `optax.clip_by_global_norm`.
    """

    kind = FactorPair

    def init(self, batch, p, q, rank, dtype, seed) -> FactorPair:
        left = jnp.zeros((*batch, p, rank), dtype)
        noise = random_columns(seed, q, rank).astype(at_least_float32(dtype))
        right = (0.02 * noise).astype(dtype)
        return FactorPair(left, jnp.broadcast_to(right, (*batch, q, rank)))

    def first_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = decay * state.product + (1 - decay) * g
        return before / mass(decay, count), self._step(state, g, decay)

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = blend(decay, state.product, g)
        new = self._step(state, jnp.abs(g), jnp.sqrt(decay))
        return before / jnp.sqrt(mass(decay, count)), new

    def _step(self, state, target, decay) -> FactorPair:
        return FactorPair(*jacobi(state.left, state.right, target, decay))


FirstMoment = LowRank | AlgorithmOne | Dense
SecondMoment = LowRank | AlgorithmOne | RotatedRankOne | RankOne | Dense
Methods = FirstMoment | SecondMoment | Mapping[str, FirstMoment | SecondMoment]
"""One for all leaves, or by pattern."""
FACTORED = (LowRank, AlgorithmOne)
"""The methods whose state is a `FactorPair`."""


def have_rank(methods) -> bool:
    """Whether any of a leaf's moments has factors of its rank; `RankOne()` has none."""
    return any(isinstance(method, FACTORED) for method in methods)


def _with_residual(weight, gain, old: FactorPair, new: FactorPair, g, decay):
    """`weight * held + gain * (X - held)`, `held` the new product, `X` what it fits.

    One product, so that one (p, q) buffer serves both parts; in full precision, for
    they may be `gain` times larger than their difference.
    """
    left = jnp.concatenate([(weight - gain) * new.left, gain * decay * old.left], 1)
    right = jnp.concatenate([new.right, old.right], axis=1)
    return dot(left, right.T) + gain * (1 - decay) * g
