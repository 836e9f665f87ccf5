"""Carries the moments of a running optimizer over into the state of another."""

import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from lorapre_jax._leaves.moments import replace_moment
from lorapre_jax._state.held_moments import holds_moments, moment_fields, moments_in
from lorapre_jax._state.old_state import OldState, read_old_state
from lorapre_jax._state.translate import Moment, forget_programs, translated
from lorapre_jax._trees.paths import named_leaves
from lorapre_jax._trees.sharding import known_sharding, replicated


def convert_state(
    state: optax.OptState,
    new_tx: optax.GradientTransformation,
    params: Any,
    *,
    b1: float | None = None,
    b2: float | None = None,
) -> Any:
    """Returns the state with which `new_tx` continues where another transform stopped.

    Moments are matched by leaf path, wherever they are in a chain. Known are those of
    this library's transforms; of `optax.ema`; of the state that `optax.adam`, `adamw`
    and `nadam` share (`adamax` too, but its `nu` is not a square); of `amsgrad`; and of
    `optax.contrib.muon`. What is carried over is the bias-corrected average, or its
    root for a second moment:

    - Factors become factors of another rank by the best truncation of their product, or
      by padding, through matrices of the size of the ranks. Nothing is (p, q).
    - A dense moment becomes factors by a randomised SVD with 8 directions more than the
      rank and 3 power iterations, one matrix at a time; a stack that is sharded over
      its batch axis is gathered for it. Measured at rank 32 of (256, 688), its error
      was 1 % above the least one for noise, and 0.1 % if singular values fall as 1/k.
    - A dense second moment becomes exactly what `RankOne()` would hold. No other second
      moment tells what `RotatedRankOne()` holds of directions, so that is taken from
      the first moment, and is right after about `1 / (1 - b2)` steps. A second moment
      that stays dense is copied; where it is next to nothing, `optax.adam` divides by
      it what factors left of the first moment there.
    - A moment that is kept as before, with factors of the same rank, is copied.
    - A leaf of which the old state keeps nothing, such as one that was frozen, starts
      from zero moments. A warning names all such leaves. They share the count of the
      others, so there is no bias correction any more: for `1 / (1 - b2)` steps their
      updates are up to `1 / sqrt(1 - b2)` times as large as at the start of a run.
    - Counts are kept. Other numbers come from the same place in the old state, and
      hyperparameters from `new_tx`. A wrapper around `new_tx` that the old one did not
      have (`optax.MultiSteps`, `apply_if_finite`) has numbers of its own: convert what
      is inside, and put it in its place in the wrapper's `init(params)`.

    Args:
      state: The state of any transform, for the same parameters, on the same devices.
      new_tx: The transform that continues. Its decay rates should be the old one's,
        since dense moments that stay dense are copied.
      params: The parameters. The new state is sharded as by `new_tx.init(params)`, with
        counters replicated on all of the parameters' devices.
      b1, b2: The decay rates, which no state holds. They are needed if a moment that
        starts from zero (`optax.adam`, `Dense()`, `AlgorithmOne()`) is exchanged for
        one that holds the bias-corrected average itself (`LowRank()`, `RankOne()`,
        `RotatedRankOne()`), and for second moments also between `Dense()` and
        `AlgorithmOne()`.

    Returns:
      A state like `new_tx.init(params)`, which shares no buffer with the old one.

    Raises:
      TypeError: It is called under jit or vmap.
      ValueError: The old state knows no leaf; lacks one of a leaf's moments, or a
        number that the new one keeps; keeps a moment twice, or in another shape (also
        than its own plan says); or is on other devices. Or a decay rate is needed, or
        factors belong to matrices along other axes. The message names the leaf.

    Examples:
      From AdamW to low-rank moments:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import lorapre_jax as lp
      >>> params = {"up": jnp.ones((256, 128))}
      >>> adamw = optax.adamw(2e-3, b1=0.9, b2=0.95)
      >>> _, state = adamw.update(params, adamw.init(params), params)
      >>> tx = lp.lorapre_adamw(2e-3, rank=8, second_moment=lp.RankOne())
      >>> state = lp.convert_state(state, tx, params, b1=0.9, b2=0.95)
      >>> print(state[0].count, state[0].mu_factors["up"].left.shape)
      1 (256, 8)

    References:
      Halko, Martinsson and Tropp, *Finding structure with randomness*, 2011, algorithms
      4.4 and 5.1: `arXiv 0909.4061 <https://arxiv.org/abs/0909.4061>`_

    See also:
      `check_state_record`; :doc:`checkpoints </checkpoints>`; :doc:`may a run change
      its optimizer? </results/switch>`
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, params))):
        raise TypeError("convert_state cannot be traced: call it outside jit and vmap.")
    old = read_old_state(state)
    fresh = new_tx.init(params)
    _warn_of_new_leaves(fresh, old)
    decays = {"first": b1, "second": b2}
    try:
        carried = [
            _filled(node, old, decays)
            if holds_moments(node)
            else old.counterpart(name, node)
            for name, node in named_leaves(fresh, is_leaf=holds_moments)
        ]
    finally:
        forget_programs()
    structure = jax.tree.structure(fresh, is_leaf=holds_moments)
    whole = jax.tree.unflatten(structure, carried)
    # Fresh buffers, so that both states can be donated.
    everywhere = replicated(filter(None, map(known_sharding, jax.tree.leaves(params))))
    return jax.tree.map(lambda x, like: _placed(x, like, everywhere), whole, fresh)


def _warn_of_new_leaves(fresh: Any, old: OldState) -> None:
    """Warns of leaves that the old state has no moments of, such as frozen ones."""
    nodes = filter(holds_moments, jax.tree.leaves(fresh, is_leaf=holds_moments))
    moments = [moment for node in nodes for moment in moments_in(node).values()]
    wanted = dict.fromkeys(moment.path for moment in moments if not moment.is_empty)
    known = old.paths
    new = [path for path in wanted if path not in known]
    if not new:
        return
    if len(new) == len(wanted):
        raise ValueError(
            f"Leaf '{new[0]}': the old state has no moment of it, nor of any other "
            "leaf of the new state. Start from new_tx.init(params), or pass the state "
            "that belongs to these parameters."
        )
    gone = sorted(known - wanted.keys())
    renamed = (
        " Leaves are matched by path; the old state's moments of "
        f"{_listed(gone)} match no leaf."
    )
    warnings.warn(
        f"convert_state: the old state has no moments of {_listed(new)}. The new ones "
        "start from zero, as if all gradients of these leaves had been zero so far."
        f"{renamed if gone else ''}",
        stacklevel=3,
    )


def _listed(paths: list[str]) -> str:
    return ", ".join(f"'{path}'" for path in paths)


def _filled(node: Any, old: OldState, decays: dict[str, float | None]) -> Any:
    """Returns a fresh state with the moments and the count of the old one."""
    values: dict[tuple[str, str], Any] = {}
    firsts: dict[str, Any] = {}
    for (name, path), moment in moments_in(node).items():
        if moment.order == "second":
            moment = moment._replace(first=firsts[path])
        values[name, path] = _carried(moment, old, decays[moment.order])
        if moment.order == "first":
            firsts[path] = values[name, path]
    filled = node._replace(count=old.count) if old.moments else node
    if isinstance(node, optax.ScaleByAmsgradState):
        known = old.maxima
        kept = [known.get(path, x) for path, x in named_leaves(node.nu_max)]
        structure = jax.tree.structure(node.nu_max)
        filled = filled._replace(nu_max=jax.tree.unflatten(structure, kept))
    for name, _, _, dense, factors in moment_fields(node):
        kept = [values[name, path] for path, _ in named_leaves(dense)]
        filled = replace_moment(
            filled,
            name,
            jax.tree.unflatten(jax.tree.structure(dense), kept),
            {path: _reboxed(values[name, path], x) for path, x in factors.items()},
        )
    return filled


def _carried(moment: Moment, old: OldState, decay: float | None) -> Any:
    """Returns the value of a moment in the new state; a new leaf keeps its zeros."""
    source = old.moments.get((moment.path, moment.order))
    if moment.is_empty:
        return moment.value
    if source is not None:
        return translated(source, moment, decay)
    if moment.path in old.paths:
        raise ValueError(
            f"Leaf '{moment.path}': the old state has no {moment.order} moment of it, "
            "and the new one needs it. Start from new_tx.init(params), or convert to a "
            f"transform without a {moment.order} moment."
        )
    return moment.value


def _reboxed(state: Any, like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))


def _placed(value: Any, like: jax.Array, everywhere: Any) -> jax.Array:
    value = jnp.asarray(value, like.dtype)
    place = known_sharding(like) or (everywhere if like.ndim == 0 else None)
    return jax.device_put(value, place, may_alias=False)
