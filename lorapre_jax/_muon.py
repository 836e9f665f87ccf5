"""LoRA-Pre Muon."""

import dataclasses
import functools
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._leaves import checks
from lorapre_jax._leaves.choice import choice
from lorapre_jax._leaves.decide import make_plan
from lorapre_jax._leaves.fit import check_fits
from lorapre_jax._leaves.map_leaves import map_leaves
from lorapre_jax._leaves.moments import init_moment
from lorapre_jax._leaves.plan import DenseLeaf, FactoredLeaf, Leaf, Plan
from lorapre_jax._leaves.selection import Matrices
from lorapre_jax._moments.methods import LowRank, Methods
from lorapre_jax._muon_shares import (
    Shares,
    orthogonalize_shares,
    plan_shares,
    without_underflow,
)
from lorapre_jax._numerics.averages import mass
from lorapre_jax._numerics.newton_schulz import (
    NS_COEFFS,
    NS_STEPS,
    Coefficients,
    orthogonalize,
)
from lorapre_jax._numerics.norms import divide_by_norm, frobenius_norm, hypot
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class ScaleByLorapreMuonState(NamedTuple):
    """State of `scale_by_lorapre_muon`.

    Attributes:
      count: Steps taken, `()`, int32.
      momentum: Of the leaves that keep it densely, as `mu` in
        `ScaleByLorapreAdamState`.
      momentum_factors: The others, by leaf path: `left (*batch, *rows, r)` and `right
        (*batch, *columns, r)` in `factor_dtype`, in boxes as the parameters are.
      plan: The decision per leaf; static, without leaves.
    """

    moments = (("momentum", "first"),)
    count: jax.typing.ArrayLike
    momentum: optax.Updates
    momentum_factors: Any
    plan: Any


DEFAULT_MOMENT = LowRank(residual_gain=0.6)


def scale_by_lorapre_muon(
    rank: int | Fraction,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    ns_steps: int | None = None,
    *,
    ns_coeffs: Coefficients = NS_COEFFS,
    eps: jax.typing.ArrayLike = 1e-8,
    consistent_rms: jax.typing.ArrayLike | None = None,
    moment: Methods = DEFAULT_MOMENT,
    matrices: Matrices = None,
    min_dim_size_to_factor: int | None = None,
    update_scale: jax.typing.ArrayLike = 1.0,
    slices_at_once: int | None = None,
    factor_dtype: jax.typing.DTypeLike = "float32",
    seed: jax.typing.ArrayLike = 0,
    param_shardings: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Muon does, with a momentum kept as thin factors.

    With factors `B A`, the residual R of their fit to the average and
    `c = residual_gain`, the update is, times a scale for the matrix's shape,

    .. math::
      \mathrm{polar}(B A) + (c / s)\; \mathrm{polar}(s R), \quad
      s^2 = \frac{(1 - \beta) (1 + \beta^t)}{(1 + \beta) (1 - \beta^t)}

    where polar is Newton-Schulz orthogonalisation. R is a single gradient's and mostly
    noise: averaged as full Muon averages it, it would be smaller by s, and
    orthogonalisation would divide by that little. As in full Muon, its iteration starts
    from `s R` over the norm of the whole average, `B A` and `s R`: a residual that is
    next to nothing, such as the rounding of gradients of low rank, stays so (but for
    bfloat16 factors, whose own rounding is more than nothing). A momentum kept as
    `AlgorithmOne()` is orthogonalised as a whole (LoRA-Pre, arXiv 2602.24283,
    for Muon), as is `Dense()`.

    Every leaf must be a matrix, or a batch of them; one whose rank does not pay keeps a
    dense momentum and is orthogonalised all the same.

    Args:
      rank: See `scale_by_lorapre_adam`, as for all arguments that are not named here.
      beta: Decay rate of the momentum, in [0, 1).
      nesterov: Whether to look one step ahead, as `optax.contrib.muon` does. Static.
      ns_steps: Number of Newton-Schulz iterations; None: 5. Static.
      ns_coeffs: Their coefficients `(a, b, c)`, or at least `ns_steps` such triples.
      eps: Added to the Frobenius norm that the iteration's start is divided by.
      consistent_rms: None scales the update by `sqrt(max(1, q/p))` (Jordan et al.,
        2024); a number, 0.2 say, by `sqrt(max(p, q))` times it, so that the update's
        root mean square does not depend on the shape (Liu et al., 2025). Where little
        of the gradients is held, it is up to `c / s` times the number.
      moment: How the momentum is kept, `LowRank(...)` or `Dense()`, or by pattern.
      param_shardings: None leaves it to the compiler how a divided matrix is
        orthogonalised: up to about two and a half times the whole matrix comes to every
        device at every iteration (`benchmarks/traffic.py`). A tree of the parameters'
        shardings (other leaves may be in it too) gives each device its share of whole
        matrices, the same number for all: their exchange brings a device at most four
        times the bytes of that share, and nothing for matrices that are not divided.
        All matrices of one size are exchanged at once, whatever `slices_at_once`
        says. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_adam`; and at `init`, for a leaf that
        is not a matrix, or that `param_shardings` has no fitting sharding for.
    """
    checks.check_storage(rank, slices_at_once, factor_dtype, seed)
    checks.check_decay("beta", beta)
    checks.check_not_negative("eps", eps)
    checks.check_not_negative("update_scale", update_scale)
    if consistent_rms is not None:
        checks.check_not_negative("consistent_rms", consistent_rms)
    kept = choice("moment", moment, DEFAULT_MOMENT)
    checks.check_methods(kept, "first_moment")
    checks.check_flag("nesterov", nesterov)
    # None by default: optax.inject_hyperparams makes arrays of numbers.
    ns_steps = NS_STEPS if ns_steps is None else ns_steps
    checks.check_count("ns_steps", ns_steps)
    checks.check_ns_coeffs(ns_coeffs, ns_steps)
    shares_of = functools.cache(functools.partial(plan_shares, param_shardings))

    def init_fn(params):
        plan = make_plan(
            params,
            (kept,),
            rank=rank,
            matrices=matrices,
            min_dim_size_to_factor=min_dim_size_to_factor,
        )
        if isinstance(plan, Plan):
            _refuse_other_than_matrices(plan)
            shares_of(plan)
        mu, factors = init_moment(plan, params, 0, factor_dtype, seed)
        return ScaleByLorapreMuonState(replicated_zero(params), mu, factors, plan)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        checks.check_state(state, ScaleByLorapreMuonState)
        check_fits(state)
        count = jax.tree.map(optax.safe_increment, state.count)

        rule = MuonRule(
            beta=beta,
            eps=eps,
            consistent_rms=consistent_rms,
            update_scale=update_scale,
            count=unboxed(count),
            seed=seed,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coeffs=ns_coeffs,
        )
        moments = [(state.momentum, state.momentum_factors)]
        shares = shares_of(state.plan) if isinstance(state.plan, Plan) else {}
        arguments = state.plan, updates, moments, slices_at_once
        if shares:
            results = _in_shares(rule, shares, param_shardings, *arguments)
        else:
            results = map_leaves(rule, *arguments)
        updates, (mu, factors) = results
        return updates, ScaleByLorapreMuonState(count, mu, factors, state.plan)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_shares(
    rule: "MuonRule",
    shares: Shares,
    param_shardings: Any,
    plan: Plan,
    updates: optax.Updates,
    moments: Any,
    slices_at_once: int | None,
) -> tuple[Any, ...]:
    """As `map_leaves(rule, ...)`; between its two parts the devices exchange blocks."""
    begin, finish = (
        jax.tree_util.Partial(part, rule) for part in (MuonRule.begin, MuonRule.finish)
    )
    wide = jax.tree.map(without_underflow, updates)
    full, moment = map_leaves(begin, plan, wide, moments, slices_at_once)
    orthogonal = orthogonalize_shares(
        rule.polar, shares, full, param_shardings, slices_at_once
    )
    return map_leaves(finish, plan, updates, [moment], slices_at_once, orthogonal)


def _refuse_other_than_matrices(plan: Plan) -> None:
    for leaf in plan.leaves:
        if isinstance(leaf, DenseLeaf) and leaf.view is None and leaf.methods:
            raise ValueError(
                f"Leaf '{leaf.path}' of shape {leaf.shape} is not a matrix "
                f"({leaf.why}), and Muon orthogonalises matrices only. Name its "
                "axes in `matrices=`, or use lorapre_muon, which gives such leaves "
                "to Adam."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MuonRule:
    """The update of one matrix; or its two parts, around the costly `polar` of one."""

    beta: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    consistent_rms: jax.typing.ArrayLike | None
    update_scale: jax.typing.ArrayLike
    count: jax.Array
    seed: jax.typing.ArrayLike
    nesterov: bool = dataclasses.field(metadata={"static": True})
    ns_steps: int = dataclasses.field(metadata={"static": True})
    ns_coeffs: Coefficients = dataclasses.field(metadata={"static": True})

    def __call__(self, leaf: Leaf, g, mu):
        part, mu = self.begin(leaf, g, mu)
        return self.finish(leaf, g, self.polar(part), mu)

    def begin(self, leaf: Leaf, g, mu):
        """What is orthogonalised as a full matrix, over its norm; the new momentum."""
        method, step = leaf.methods[0], (self.count, self.seed)
        beta = jnp.asarray(self.beta, g.dtype)
        if isinstance(method, LowRank):
            mu, _, residual = method.split_moment(mu, g, beta, *step)
            residual = _share_of_noise(beta, self.count) * residual
            norm = hypot(frobenius_norm(mu.right), frobenius_norm(residual))
            return divide_by_norm(residual, norm, self.eps), mu
        m, mu = method.first_moment(mu, g, beta, *step)
        m = self.look_ahead(m, g)
        return divide_by_norm(m, frobenius_norm(m), self.eps), mu

    def finish(self, leaf: Leaf, g, orthogonal, mu):
        """The update, from what `begin` gave, orthogonalised; and the same momentum."""
        update = orthogonal
        if isinstance(leaf.methods[0], LowRank):
            beta = jnp.asarray(self.beta, g.dtype)
            gain = leaf.methods[0].residual_gain
            gain = gain / _share_of_noise(beta, self.count)
            # The left factor is orthonormal, where `right` is not rounding alone: it
            # stays outside.
            right = self.look_ahead(mu.right, g.T @ mu.left)
            right = divide_by_norm(right, frobenius_norm(right), self.eps)
            update = mu.left @ self.polar(right).T + gain * orthogonal
        scale = _shape_scale(g.shape, self.consistent_rms, g.dtype)
        if isinstance(leaf, FactoredLeaf):
            scale = scale * jnp.asarray(self.update_scale, g.dtype)
        return update * scale, mu

    def polar(self, x):
        return orthogonalize(x, self.ns_coeffs, self.ns_steps)

    def look_ahead(self, m, g):
        """The bias-corrected average as `optax.contrib.muon` looks ahead."""
        if not self.nesterov:
            return m
        b = jnp.asarray(self.beta, g.dtype)
        now, ahead = mass(b, self.count), mass(b, optax.safe_increment(self.count))
        return b * (now / ahead) * m + ((1 - b) / now) * g


def _share_of_noise(beta, count):
    """What the corrected average of `count` steps leaves of uncorrelated noise."""
    total = mass(beta, count)
    return jnp.sqrt((1 - beta) / (1 + beta) * (2 - total) / total)


def _shape_scale(shape: tuple[int, ...], consistent_rms, dtype) -> jax.Array:
    p, q = shape
    if consistent_rms is None:
        return jnp.sqrt(jnp.asarray(max(1.0, q / p), dtype))
    return jnp.sqrt(jnp.asarray(max(p, q), dtype)) * jnp.asarray(consistent_rms, dtype)
