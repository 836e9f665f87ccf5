"""LoRA-Pre Muon for matrices, with Adam for all other leaves."""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import optax

from lorapre_jax._adam_alias import decayed_weights, lorapre_adamw
from lorapre_jax._leaves import checks
from lorapre_jax._leaves.roles import roles
from lorapre_jax._leaves.selection import Decided, Matrices, resolve_axes
from lorapre_jax._moments.methods import Methods
from lorapre_jax._muon import (
    DEFAULT_MOMENT,
    ScaleByLorapreMuonState,
    scale_by_lorapre_muon,
)
from lorapre_jax._numerics.newton_schulz import NS_COEFFS, Coefficients
from lorapre_jax._trees.paths import named_leaves


def lorapre_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | Fraction,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    ns_steps: int | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
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
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Muon with a low-rank momentum for the matrices, and Adam for all other leaves.

    Args:
      learning_rate: A number or a schedule.
      rank: See `scale_by_lorapre_muon`, as for all arguments that are not named here.
      weight_decay: Decoupled weight decay of the matrices, as in `lorapre_adamw`.
      weight_decay_mask: Which of them decay, as `mask` of `optax.adamw`.
      matrices: Which leaves are orthogonalised. All others go to Adam with dense
        moments. None: every matrix except embeddings and heads, which go to Adam and
        are factored as by `lorapre_adamw`. A selection that extends the default treats
        them likewise.
      adam_learning_rate: Learning rate of Adam. None: `learning_rate`.
      adam_b1, adam_b2, adam_weight_decay: Of Adam, as in `optax.contrib.muon`. Adam
        shares `eps`, and unlike optax's it never looks a step ahead (no `nesterov`).

    Returns:
      The `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As `scale_by_lorapre_muon`. At `update`: weights decay and
        `params` are not given.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import lorapre_jax as lp
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> tx = lp.lorapre_muon(5e-3, rank=32, consistent_rms=0.2)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Wang et al., *Taming Momentum: Rethinking Optimizer States Through Low-Rank
      Approximation* (LoRA-Pre), 2026: `arXiv 2602.24283
      <https://arxiv.org/abs/2602.24283>`_

    See also:
      `scale_by_lorapre_muon`, `optax.contrib.muon`; :doc:`Muon on a mesh </meshes>`.
    """
    checks.check_decay("adam_b1", adam_b1)
    checks.check_decay("adam_b2", adam_b2)
    scale_by_muon = functools.partial(
        scale_by_lorapre_muon,
        rank,
        beta,
        nesterov,
        ns_steps,
        ns_coeffs=ns_coeffs,
        eps=eps,
        consistent_rms=consistent_rms,
        moment=moment,
        min_dim_size_to_factor=min_dim_size_to_factor,
        update_scale=update_scale,
        slices_at_once=slices_at_once,
        factor_dtype=factor_dtype,
        seed=seed,
        param_shardings=param_shardings,
    )
    adam = functools.partial(
        lorapre_adamw,
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        rank,
        adam_b1,
        adam_b2,
        eps,
        adam_weight_decay,
        min_dim_size_to_factor=min_dim_size_to_factor,
        slices_at_once=slices_at_once,
        factor_dtype=factor_dtype,
        seed=seed,
    )

    def parts(matrices: Any) -> dict[Any, Any]:
        muon = optax.chain(
            scale_by_muon(matrices=matrices),
            decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )
        return {"muon": muon, "adam": adam(matrices=matrices)}

    def init_fn(params):
        for path, leaf in named_leaves(params):
            checks.check_floating(path, leaf)
        # Decided on the whole tree, since names and shapes say less in a part of it.
        by_role = roles(params)
        decided = Decided(by_role, resolve_axes(matrices, params, by_role))
        # A function, since a tree of labels that is an Equinox module is callable.
        labels = functools.partial(_labels, decided)
        return optax.partition(parts(decided), labels).init(params)

    def update_fn(updates, state, params=None, **extra_args):
        labels = functools.partial(_labels_in, state)
        both = optax.partition(parts(matrices), labels)
        return both.update(updates, state, params, **extra_args)

    parts(matrices)  # Checks the arguments.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _labels(decided: Decided, params: optax.Params) -> Any:
    """Returns a tree with the name of the part that each leaf goes to."""

    def label(path: str) -> str:
        axes, _, by_default = decided.axes[path]
        is_adams = by_default and decided.by_role[path].is_end
        return "adam" if axes is None or is_adams else "muon"

    labels = [label(path) for path, _ in named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _labels_in(state: Any, updates: optax.Updates) -> Any:
    """Returns the same labels, read from the plan in the state.

    Updates may have lost their boxes, and with them the names of axes.
    """
    checks.check_state(state, optax.PartitionState)
    muon = state.inner_states["muon"].inner_state[0]
    checks.check_state(muon, ScaleByLorapreMuonState)
    of_muon = {leaf.path for leaf in muon.plan.leaves}
    labels = [
        "muon" if path in of_muon else "adam" for path, _ in named_leaves(updates)
    ]
    return jax.tree.unflatten(jax.tree.structure(updates), labels)
