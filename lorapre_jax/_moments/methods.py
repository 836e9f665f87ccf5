"""How a moment is kept: frozen values that a transform takes as arguments.

A method turns gradients into a bias-corrected moment. Each function below sees one
matrix; batch axes are mapped outside. `Dense` also sees leaves of any other shape, and
its state is an array of the leaf's shape.

    init(batch, p, q, rank, dtype, seed)         -> state of matrices (*batch, p, q)
    first_moment(state, g, decay, count, seed)   -> estimate of E[g], new state
    second_moment(state, g, decay, count, seed)  -> estimate of sqrt(E[g^2]), new state

    first_weight(decay, count), second_weight(decay, count)  -> what bias correction
        divides the state by: the total weight in it of the gradients so far, or, for
        a second moment, what that makes of its root

`factors_type` is the class of the state; `Dense` has none. `RotatedRankOne` has
`rotated_moment` instead, which sees the gradient as `LowRank.split_moment` splits it.

Second moments are returned as their roots, which have the gradient's scale. Factored
second moments never form the square, which would under- or overflow sooner.
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
    mass_of_root,
    one,
    root_of_mass,
    unbiased_decay,
)
from lorapre_jax._numerics.norms import inverse_root, largest, relative, root
from lorapre_jax._numerics.online_regression import jacobi, subspace


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keeps the full moment, one number per parameter, as `optax.scale_by_adam` does.

    It is a first or a second moment, in float32 at least.

    Examples:
      A dense second moment for the output projections only:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": {"down": jax.ShapeDtypeStruct((2048, 512), "float32")}}
      >>> tx = lp.scale_by_lorapre_adam(rank=64, second_moment={"down$": lp.Dense()})
      >>> print(lp.describe(tx, params).leaves[0].methods)
      (LowRank(residual_gain=1.0), Dense())

    References:
      Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, algorithm 1:
      `arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`_

    See also:
      `LowRank`, `RankOne`; :doc:`methods by pattern </choosing>`.
    """

    factors_type = None
    first_weight = staticmethod(mass)
    second_weight = staticmethod(root_of_mass)

    def first_moment(self, mu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        mu = decay * mu + (1 - decay) * g
        return mu / self.first_weight(decay, count), mu

    def second_moment(self, nu, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        nu = decay * nu + (1 - decay) * jnp.square(g)
        return root(nu) / self.second_weight(decay, count), nu


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

    def init(self, batch, p, q, rank, dtype, seed) -> RowColumn:
        del rank, seed
        dtype = at_least_float32(dtype)
        return RowColumn(jnp.zeros((*batch, p), dtype), jnp.zeros((*batch, q), dtype))

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = unbiased_decay(decay, count, g.dtype)
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

    def init(self, batch, p, q, rank, dtype, seed) -> RotatedRowColumn:
        del seed
        dtype = at_least_float32(dtype)
        return RotatedRowColumn(*(jnp.zeros((*batch, n), dtype) for n in (p, q, rank)))

    def rotated_moment(self, state, g, components, residual, decay, count):
        """Returns the roots of v, `(q, r)`, and of w, `(p, q)`; and the new state.

        Args:
          components: `g^T B`, `(q, r)`.
          residual: R, `(p, q)`.
        """
        decay = unbiased_decay(decay, count, g.dtype)
        # One scale for all squares, so that none under- or overflows; components are
        # at most a root of p larger than entries of g.
        scale = largest(g, residual, state.column)
        squares, of_components, of_residual = (
            jnp.square(x / scale) for x in (g, components, residual)
        )
        floor = FLOOR**2
        now = RotatedRowColumn(
            row=jnp.mean(of_residual, 1) + floor * jnp.mean(squares, 1),
            column=jnp.mean(squares, 0),
            direction=jnp.mean(of_components, 0) + floor * jnp.mean(squares),
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
    r"""Keeps a moment as a pair of factors, `m = B A`, `r (p + q)` numbers per matrix.

    At each step the factors, `B: (p, r)` and `A: (r, q)`, take one orthonormal step of
    subspace iteration towards

    .. math::
      X = \hat b\, B A + (1 - \hat b)\, g, \qquad
      \hat b = b\, \frac{1 - b^{t-1}}{1 - b^t}

    with b the decay rate of the moment. They thus hold the bias-corrected average
    itself: gradients that are one constant of rank at most r give that constant at
    every step. What the factors miss is the residual of the fit, with the factors after
    the step,

    .. math::
      R = \frac{X - B A}{1 - \hat b}

    A first moment returns :math:`B A + \gamma R`. With :math:`\gamma = 1` and t large,
    the residual has at once the weight that a full average would give it over all later
    steps.

    A second moment follows `|g|` with decay rate `sqrt(b_2)` and is read squared, so
    that it cannot be negative: :math:`v = \hat{b_2} (B A)^2 + (1 - \hat{b_2}) g^2`,
    with the factors before the step. It is exact if `|g|` is constant and of rank at
    most r.

    The state holds B and the transpose of A, `left` and `right`, in `factor_dtype`.

    Attributes:
      residual_gain: The gain :math:`\gamma` of the residual. With 1, what the factors
        miss has the same total weight over time as what they hold, as in a full
        average. First moments only.

    Raises:
      ValueError: The gain is negative, infinite, or not a number.

    Examples:
      A momentum without the residual:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> tx = lp.lorapre_ema(0.9, rank=64, moment=lp.LowRank(residual_gain=0.0))
      >>> print(jax.eval_shape(tx.init, params).ema_factors["mlp"].right.shape)
      (2048, 64)

    References:
      After Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, section 3 and appendix B.1: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `AlgorithmOne`, `Dense`; :doc:`the method </method>`; :doc:`which rank
      </choosing>`.
    """

    residual_gain: float = 1.0
    factors_type = FactorPair
    first_weight = second_weight = staticmethod(one)

    def __post_init__(self):
        gain = self.residual_gain
        if not (isinstance(gain, numbers.Real) and 0 <= gain < math.inf):
            raise ValueError(
                f"residual_gain must be a finite number of at least 0, got {gain!r}."
            )
        # LowRank(1) and LowRank(1.0) are the same in a report and in a record.
        object.__setattr__(self, "residual_gain", float(gain))

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
        """Returns the new factors; `g^T B`, `(q, r)`; and the residual R, `(p, q)`.

        R has what the factors miss of g and what they drop of the old product.
        """
        decay = unbiased_decay(decay, count, g.dtype)
        new, components = self._step(state, g, decay, seed)
        residual = _with_residual(0, 1 / (1 - decay), state, new, g, decay)
        return new, components, residual

    def second_moment(self, state, g, decay, count, seed):
        target, decay = jnp.abs(g), jnp.asarray(decay, g.dtype)
        root_decay = unbiased_decay(jnp.sqrt(decay), count, g.dtype)
        decay = unbiased_decay(decay, count, g.dtype)
        # Read from the factors before the step: after it, g^2 would count twice.
        before = blend(decay, state.product, g)
        return before, self._step(state, target, root_decay, seed)[0]

    def _step(self, state, target, decay, seed) -> tuple[FactorPair, jax.Array]:
        left, right = state
        noise = random_columns(seed, *right.shape).astype(target.dtype)
        new, components = subspace(left, right, target, decay, noise)
        return FactorPair(*new), components


@dataclasses.dataclass(frozen=True)
class AlgorithmOne:
    r"""Keeps a moment as LoRA-Pre's Algorithm 1 does, `r (p + q)` numbers per matrix.

    Each factor takes the damped Newton step of Theorem 3.1, B from zero and A from a
    random start:

    .. math::
      B \leftarrow (1 - \eta) B + \eta\, g A^T (A A^T)^{-1}, \qquad
      A \leftarrow (1 - \eta) A + \eta\, (B^T B)^{-1} B^T g, \qquad
      1 - \eta = \sqrt{b}

    A first moment is read as :math:`b_1 B A + (1 - b_1) g` with the factors before the
    step, over `1 - b_1^t`. The factors C and D of a second moment follow `|g|` with
    decay rate `sqrt(b_2)`, and it is read as :math:`b_2 (C D)^2 + (1 - b_2) g^2`, over
    `1 - b_2^t`. What rounding may take from a Gram matrix (8 machine epsilons of its
    trace) is added to the 1e-6 by which the paper damps it (Appendix C.1).

    The step is quadratic in the gradient and unbounded: after a gradient far larger
    than those before it, the factors overshoot. Clip the gradients,
    `optax.clip_by_global_norm`; :doc:`what is hard </results/hard>` has figures.

    Examples:
      The paper's algorithm for Adam, with its published recipe:

      >>> import jax
      >>> import lorapre_jax as lp
      >>> params = {"mlp": jax.ShapeDtypeStruct((512, 2048), "float32")}
      >>> paper = lp.AlgorithmOne()
      >>> tx = lp.lorapre_adamw(
      ...     1e-3, rank=64, first_moment=paper, second_moment=paper, update_scale=0.25
      ... )
      >>> print(lp.describe(tx, params).leaves[0].methods)
      (AlgorithmOne(), AlgorithmOne())

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026, algorithm 1 and theorem 3.1: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `LowRank`; :doc:`the method </method>`.
    """

    factors_type = FactorPair
    first_weight = staticmethod(mass)
    second_weight = staticmethod(mass_of_root)

    def init(self, batch, p, q, rank, dtype, seed) -> FactorPair:
        left = jnp.zeros((*batch, p, rank), dtype)
        noise = random_columns(seed, q, rank).astype(at_least_float32(dtype))
        right = (0.02 * noise).astype(dtype)
        return FactorPair(left, jnp.broadcast_to(right, (*batch, q, rank)))

    def first_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = decay * state.product + (1 - decay) * g
        return before / self.first_weight(decay, count), self._step(state, g, decay)

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = jnp.asarray(decay, g.dtype)
        before = blend(decay, state.product, g)
        new = self._step(state, jnp.abs(g), jnp.sqrt(decay))
        # The paper corrects as if the state were Adam's, and not by `second_weight`.
        return before / root_of_mass(decay, count), new

    def _step(self, state, target, decay) -> FactorPair:
        return FactorPair(*jacobi(state.left, state.right, target, decay))


FirstMoment = LowRank | AlgorithmOne | Dense
SecondMoment = LowRank | AlgorithmOne | RotatedRankOne | RankOne | Dense
Methods = FirstMoment | SecondMoment | Mapping[str, FirstMoment | SecondMoment]
"""One method for all leaves, or a mapping from patterns on leaf paths to methods."""


def have_rank(methods) -> bool:
    """Whether any of a leaf's moments is a `FactorPair`, which has a rank."""
    return any(method.factors_type is FactorPair for method in methods)


def _with_residual(weight, gain, old: FactorPair, new: FactorPair, g, decay):
    """Returns `weight * B A + gain * (X - B A)`, with `B A` the new product.

        X = hat b * (old product) + (1 - hat b) g

    This is one product of `(p, 2r)` and `(2r, q)`, so that one (p, q) buffer serves
    both terms. It is in full precision, since the terms may be `gain` times larger than
    their difference.
    """
    left = jnp.concatenate([(weight - gain) * new.left, gain * decay * old.left], 1)
    right = jnp.concatenate([new.right, old.right], axis=1)
    return dot(left, right.T) + gain * (1 - decay) * g
