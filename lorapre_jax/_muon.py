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
from lorapre_jax._moments.low_rank import LowRank
from lorapre_jax._moments.methods import Methods
from lorapre_jax._muon_shares import (
    Shares,
    orthogonalize_shares,
    plan_shares,
    without_underflow,
)
from lorapre_jax._numerics.averages import mass, unbiased_decay
from lorapre_jax._numerics.newton_schulz import (
    NS_COEFFS,
    NS_STEPS,
    Coefficients,
    orthogonalize,
)
from lorapre_jax._numerics.norms import divide_by_norm, frobenius_norm
from lorapre_jax._trees.boxes import unboxed
from lorapre_jax._trees.sharding import replicated_zero


class ScaleByLorapreMuonState(NamedTuple):
    """State of `scale_by_lorapre_muon`.

    Attributes:
      count: Number of steps taken, `()`, int32.
      momentum: The dense momenta: a tree like the parameters, float32 at least, with
        `optax.MaskedNode` in place of leaves whose momentum is factored.
      momentum_factors: The factored momenta, by leaf path: `left (*batch, *rows, r)`
        and `right (*batch, *columns, r)` in `factor_dtype`, in boxes like the
        parameter's.
      plan: The decision for each leaf: a static pytree node without leaves.
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
    r"""Rescales updates as Muon does, with a momentum that is kept as low-rank factors.

    With the factors B and A of the bias-corrected momentum, the residual R of their fit
    and its gain :math:`\gamma` (`LowRank`), the update is, times a scale for the shape
    of the matrix,

    .. math::
      u = \mathrm{polar}(B A) + \frac{\gamma}{\sigma}\, \mathrm{polar}(\sigma R), \qquad
      \sigma^2 = \frac{(1 - \beta) (1 + \beta^t)}{(1 + \beta) (1 - \beta^t)}

    where polar is Newton-Schulz orthogonalisation. R comes from a single gradient and
    is mostly noise; the average of full Muon would shrink it by :math:`\sigma`. The
    iteration for :math:`\sigma R` starts from the norm of the whole average, as in full
    Muon, so that a residual of next to nothing, such as the rounding of gradients of
    low rank, stays so. (The rounding of bfloat16 factors is larger than that.) A
    momentum that is kept as `AlgorithmOne()` or `Dense()` is orthogonalised as a whole.

    Every leaf must be a matrix or a batch of matrices. If its rank does not pay, its
    momentum is dense, and it is orthogonalised all the same.

    Args:
      rank: See `scale_by_lorapre_adam`, as for all arguments that are not named here.
      beta: Decay rate of the momentum, in [0, 1).
      nesterov: Whether to look one step ahead, as `optax.contrib.muon` does. Static.
      ns_steps: Number of Newton-Schulz iterations. None: 5. Static.
      ns_coeffs: Their coefficients `(a, b, c)`, or at least `ns_steps` such triples.
        Static.
      eps: Added to the Frobenius norm by which the iteration's start is divided.
      consistent_rms: None scales the update by `sqrt(max(1, q/p))` (Jordan et al.). A
        number, for example 0.2, scales it by that number times `sqrt(max(p, q))`, so
        that the update's root mean square does not depend on the shape (Liu et al.);
        learning rates are then like AdamW's. If the factors capture little of the
        gradients, the root mean square is up to :math:`\gamma / \sigma` times the
        number.
      moment: How the momentum is kept: `LowRank(...)`, `Dense()` or `AlgorithmOne()`;
        or a mapping from patterns on leaf paths to these.
      param_shardings: How whole matrices are orthogonalised if they are sharded. None
        leaves it to the compiler, which gathers them on every device. A tree of the
        parameters' shardings (it may have other leaves too) gives each device its share
        of whole matrices, for which devices exchange their shards. All matrices of one
        size are exchanged at once, whatever `slices_at_once` says. Static.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state
      `ScaleByLorapreMuonState`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_adam`. At `init`: a leaf is not a
        matrix, or `param_shardings` has no fitting sharding for it.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import lorapre_jax as lp
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> tx = lp.scale_by_lorapre_muon(rank=32)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
      >>> print(jax.tree.map(jnp.shape, state.momentum_factors))
      {'kernel': FactorPair(left=(256, 32), right=(512, 32))}

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

      Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024:
      `kellerjordan.github.io/posts/muon <https://kellerjordan.github.io/posts/muon/>`_

      Liu et al., *Muon is Scalable for LLM Training*, 2025: `arXiv 2502.16982
      <https://arxiv.org/abs/2502.16982>`_

    See also:
      `lorapre_muon`, `optax.contrib.scale_by_muon`; :doc:`the method </method>`;
      :doc:`Muon on a mesh </meshes>`.
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
            _check_all_are_matrices(plan)
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
    """Does what `map_leaves(rule, ...)` does; devices exchange shards in between."""
    begin, finish = (
        jax.tree_util.Partial(part, rule) for part in (MuonRule.begin, MuonRule.finish)
    )
    wide = jax.tree.map(without_underflow, updates)
    full, moment = map_leaves(begin, plan, wide, moments, slices_at_once)
    orthogonal = orthogonalize_shares(
        rule.polar, shares, full, param_shardings, slices_at_once
    )
    return map_leaves(finish, plan, updates, [moment], slices_at_once, orthogonal)


def _check_all_are_matrices(plan: Plan) -> None:
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
    """The update of one matrix; or its two parts, `begin` and `finish`, around `polar`.

    Orthogonalisation is costly and crosses shards, so it can be done elsewhere between
    the two parts.
    """

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
        """Returns the full matrix to orthogonalise, and the new momentum.

        The matrix is `sigma R` for a `LowRank` momentum and the whole momentum
        otherwise, divided by its norm.
        """
        method, beta = leaf.methods[0], jnp.asarray(self.beta, g.dtype)
        if isinstance(method, LowRank):
            decay = unbiased_decay(beta, self.count)
            mu, _, residual = method.split_moment(mu, g, decay, self.seed)
            residual = _share_of_noise(beta, self.count) * residual
            # The norm of the whole average, since B A and sigma R are nearly
            # orthogonal. Divided by its own norm, a residual that is only rounding
            # would be blown up.
            norm = frobenius_norm(mu.right, residual)
            return divide_by_norm(residual, norm, self.eps), mu
        m, mu = method.first_moment(mu, g, beta, self.count, self.seed)
        m = self.look_ahead(m, g)
        return divide_by_norm(m, frobenius_norm(m), self.eps), mu

    def finish(self, leaf: Leaf, g, orthogonal, mu):
        """Returns the update and the momentum.

        Args:
          orthogonal: The polar factor of what `begin` returned.
        """
        update = orthogonal
        if isinstance(leaf.methods[0], LowRank):
            beta = jnp.asarray(self.beta, g.dtype)
            gain = leaf.methods[0].residual_gain
            gain = gain / _share_of_noise(beta, self.count)
            # polar(B A) = B polar(A), since B is orthonormal wherever A is more than
            # rounding. The norm of A is that of the product.
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
        """Returns the average `m` one step ahead, as `optax.contrib.muon` does."""
        if not self.nesterov:
            return m
        b = jnp.asarray(self.beta, g.dtype)
        now, ahead = mass(b, self.count), mass(b, optax.safe_increment(self.count))
        return b * (now / ahead) * m + ((1 - b) / now) * g


def _share_of_noise(beta, count):
    """Returns sigma: by how much the corrected average of `count` steps shrinks noise.

    That is the root of the sum of its squared weights if the noise is uncorrelated.
    """
    total = mass(beta, count)
    return jnp.sqrt((1 - beta) / (1 + beta) * (2 - total) / total)


def _shape_scale(shape: tuple[int, ...], consistent_rms, dtype) -> jax.Array:
    p, q = shape
    if consistent_rms is None:
        return jnp.sqrt(jnp.asarray(max(1.0, q / p), dtype))
    return jnp.sqrt(jnp.asarray(max(p, q), dtype)) * jnp.asarray(consistent_rms, dtype)
