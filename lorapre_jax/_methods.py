"""How a moment is kept: frozen values that a transform takes as arguments.

A method turns a gradient into a bias-corrected moment. Each function below sees one
matrix (`Dense`, whose state is an array like it, also any other leaf); batch axes are
mapped outside.

    init(batch, p, q, rank, dtype, seed)         -> state
    first_moment(state, g, decay, count, seed)   -> estimate of E[g], new state
    second_moment(state, g, decay, count, seed)  -> estimate of sqrt(E[g^2]), new state

Second moments come back as their root: it has the gradient's scale, and factored ones
never form its square, which would under- or overflow sooner.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lorapre_jax import _online_regression as regression


class FactorPair(NamedTuple):
    """The factors of `left @ right`."""

    axes = (("row", "rank"), ("rank", "column"))  # After the batch axes.
    left: jax.Array  # (*batch, p, r)
    right: jax.Array  # (*batch, r, q)


class RowColumn(NamedTuple):
    """Root mean squares of the rows and of the columns."""

    axes = (("row",), ("column",))
    row: jax.Array  # (*batch, p)
    column: jax.Array  # (*batch, q)


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
        return jnp.sqrt(nu / mass(decay, count)), nu


@dataclasses.dataclass(frozen=True)
class RankOne:
    """Second moment from row and column statistics, `p + q` numbers per matrix.

    Adafactor's estimate (Shazeer and Stern, 2018, algorithm 2): with `R_i` and `C_j`
    the moving averages of the mean of `g^2` over row i and over column j,
    `v_ij = R_i C_j / mean(R)`. It is exact where `g^2` has rank one. The state holds
    `sqrt(R)` and `sqrt(C)` in float32 at least, whatever `factor_dtype` says.
    """

    def init(self, batch, p, q, rank, dtype, seed) -> RowColumn:
        del rank, seed
        dtype = at_least_float32(dtype)
        return RowColumn(jnp.zeros((*batch, p), dtype), jnp.zeros((*batch, q), dtype))

    def second_moment(self, state, g, decay, count, seed):
        del seed
        decay = _unbiased(decay, count, g.dtype)
        row, column = (
            _blend_squares(decay, old, regression.root_mean_square(g, axis))
            for old, axis in ((state.row, 1), (state.column, 0))
        )
        total = regression.root_mean_square(row)
        root = row[:, None] * (column / jnp.where(total > 0, total, 1))
        return root, RowColumn(row, column)


@dataclasses.dataclass(frozen=True)
class OnlineRegression:
    """A moment kept as a pair of thin factors, `m = left @ right`, `r (p + q)` numbers.

    The factors follow their target in closed form (LoRA-Pre, arXiv 2602.24283). The
    target is `g` for a first moment. A second moment follows `|g|` with decay
    `sqrt(b2)` and is read squared, so it cannot go negative (Appendix B.1); it is read
    from the factors before the step plus `(1 - b2) g^2`, as Algorithm 1 does.

    Attributes:
      rule: How a step moves the factors. `"subspace"` (default): one subspace
        iteration on `b B A + (1-b) g`; `"jacobi"`: Theorem 3.1; `"gauss_seidel"`:
        the same, the second factor reading the first one's new value. These two are
        quadratic in `g`: after many zero gradients in a row a large one overshoots.
      damping: What is added to the Gram matrices that "jacobi" and "gauss_seidel"
        invert; `"subspace"` inverts none and takes None. None means 1e-6 elsewhere.
      damping_scale: `"relative"`, to the trace of the Gram matrix, so that the scale of
        the loss does not matter; or `"absolute"`. What rounding may take from a Gram
        matrix (8 machine epsilons of its trace) is added to either.
      start: `"gradient"`: both factors start from a randomised range-finder pass on the
        first gradient that is not zero; `"random"`: left factor zero, right factor
        N(0, 0.02^2). `"subspace"` makes that pass from either.
      bias_correction: `"exact"`: the factors hold the bias-corrected average itself, by
        the decay `b (1 - b^(t-1)) / (1 - b^t)` at step t, so a constant target gives
        that constant at every step; `"adam"`: constant decay, and the moment as read
        is divided by `1 - b^t`.
      complement_gain: Total weight, over time, of the part of a gradient that the
        factors do not take up. One (default) is what they take up has, and what every
        direction has in the full average. None reads `b m + (1-b) g` from the factors
        before the step, as Algorithm 1 does: weight `1-b`. First moments only; a
        second moment always adds `(1 - b2) g^2`.

    Raises:
      ValueError: A field has a value that is not listed above, or damping is given to
        the rule that has none, or is not positive.
    """

    rule: str = "subspace"
    damping: float | None = None
    damping_scale: Literal["relative", "absolute"] = "relative"
    start: Literal["gradient", "random"] = "gradient"
    bias_correction: Literal["exact", "adam"] = "exact"
    complement_gain: float | None = 1.0

    @classmethod
    def paper(cls) -> "OnlineRegression":
        """Algorithm 1 of the paper to the letter, for either moment."""
        return cls("jacobi", 1e-6, "absolute", "random", "adam", None)

    def __post_init__(self):
        _check_choice(self, "rule", tuple(regression.RULES))
        _check_choice(self, "damping_scale", ("relative", "absolute"))
        _check_choice(self, "start", ("gradient", "random"))
        _check_choice(self, "bias_correction", ("exact", "adam"))
        if self.damping is not None and self.rule == "subspace":
            raise ValueError("damping: rule='subspace' inverts nothing; leave it None.")
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}.")
        if self.complement_gain is not None and not self.complement_gain >= 0:
            raise ValueError(
                f"complement_gain must be None or at least 0, got "
                f"{self.complement_gain}."
            )

    def init(self, batch, p, q, rank, dtype, seed) -> FactorPair:
        right = jnp.zeros((rank, q), dtype)
        if self.start == "random":
            noise = random_rows(seed, rank, q).astype(at_least_float32(dtype))
            right = (0.02 * noise).astype(dtype)
        left = jnp.zeros((*batch, p, rank), dtype)
        return FactorPair(left, jnp.broadcast_to(right, (*batch, rank, q)))

    def first_moment(self, state, g, decay, count, seed):
        decay = jnp.asarray(decay, g.dtype)
        step_decay, weight = self._weights(decay, count)
        new = self._step(state, g, step_decay, seed)
        if self.complement_gain is None:
            before = step_decay * (state.left @ state.right) + (1 - step_decay) * g
            return weight * before, new
        gain = self.complement_gain / (1 - step_decay)
        return _with_residual(weight, gain, state, new, g, step_decay), new

    def split_moment(self, state, g, decay, count, seed):
        """What the factors hold, the left one orthonormal, and the fit's residual."""
        decay = jnp.asarray(decay, g.dtype)
        step_decay, weight = self._weights(decay, count)
        new = self._step(state, g, step_decay, seed)
        residual = _with_residual(0, 1, state, new, g, step_decay)
        left, right = new.left, weight * new.right
        if self.rule != "subspace":
            left = regression.orthonormal_columns(new.left)
            right = regression.dot(regression.dot(left.T, new.left), right)
        return FactorPair(left, right), residual, new

    def second_moment(self, state, g, decay, count, seed):
        decay = jnp.asarray(decay, g.dtype)
        target = jnp.abs(g)
        new = self._step(state, target, self._weights(jnp.sqrt(decay), count)[0], seed)
        square_decay, weight = self._weights(decay, count)
        root = jnp.hypot(
            jnp.sqrt(square_decay) * (state.left @ state.right),
            jnp.sqrt(1 - square_decay) * target,
        )
        return jnp.sqrt(weight) * root, new

    def _weights(self, decay, count):
        """This step's decay, and what the average is multiplied by when it is read."""
        if self.bias_correction == "exact":
            return _unbiased(decay, count, decay.dtype), jnp.ones((), decay.dtype)
        return decay, 1 / mass(decay, count)

    def _step(self, state, target, decay, seed) -> FactorPair:
        rank, q = state.right.shape
        noise = random_rows(seed, rank, q).astype(target.dtype)
        damping = 1e-6 if self.damping is None else self.damping

        def step(left, right):
            return regression.RULES[self.rule](
                left,
                right,
                target,
                decay,
                lambda gram: (
                    damping * jnp.trace(gram)
                    if self.damping_scale == "relative"
                    else jnp.asarray(damping, gram.dtype)
                ),
                noise,
            )

        # The subspace rule starts itself: its sketch of zero factors is random.
        if self.start == "random" or self.rule == "subspace":
            return FactorPair(*step(*state))
        return FactorPair(
            *jax.lax.cond(
                jnp.any(state.right != 0),
                step,
                lambda *_: regression.start_from(target, decay, noise),
                *state,
            )
        )


def _with_residual(weight, gain, old: FactorPair, new: FactorPair, g, decay):
    """`weight * held + gain * (X - held)`, `held` the new product, `X` what it fits.

    One product, so that one (p, q) buffer serves both parts; in full precision, for
    they may be `gain` times larger than their difference.
    """
    left = jnp.concatenate([(weight - gain) * new.left, gain * decay * old.left], 1)
    right = jnp.concatenate([new.right, old.right], axis=0)
    return regression.dot(left, right) + gain * (1 - decay) * g


def random_rows(seed, rank: int, q: int) -> jax.Array:
    """Standard normal `(rank, q)` float32, the same for every leaf and slice."""
    return jax.random.normal(jax.random.key(seed), (rank, q), jnp.float32)


def at_least_float32(*dtypes) -> jnp.dtype:
    """Their common dtype with float32, also where implicit promotion is forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes, jnp.float32)


def mass(decay, count):
    """`1 - b^t`: the total weight of an average that started from zero."""
    return 1 - decay ** count.astype(decay.dtype)


def _unbiased(decay, count, dtype):
    """The decay that turns one bias-corrected average into the next."""
    decay = jnp.asarray(decay, dtype)
    return decay * mass(decay, count - 1) / mass(decay, count)


def _blend_squares(decay, old, new):
    return jnp.hypot(jnp.sqrt(decay) * old, jnp.sqrt(1 - decay) * new)


def _check_choice(method, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(method, name)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.")
