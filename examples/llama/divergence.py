"""Finds numbers that are not finite, so that they are never saved."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

_WATCHED = ("train_loss", "grad_norm")


class NotFinite(Exception):
    """At a step of the run, something was NaN or infinite.

    Attributes:
      step: Updates done by then, counted with this one.
      what: What it was, for people.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} not finite at step {step}")
        self.step, self.what = step, what


class Diverged(Exception):
    """The run stopped because of ``NotFinite``; nothing of it was saved."""

    def __init__(self, error: NotFinite, good: Path | None):
        saved = (
            f"The last good checkpoint is {good}." if good else "None was saved yet."
        )
        super().__init__(
            f"Diverged: {error}. {saved} The same command would come to the same point "
            "again: start another run with a lower `optimizer.learning_rate` or a "
            "`optimizer.clip_norm`, or go on with `skip_nonfinite: N`, which leaves "
            "out up to N such steps in a row."
        )


def check_record(record: Mapping[str, float], skipped_at_most: int) -> None:
    """Raise ``NotFinite`` unless the run may go on after what it has logged.

    Args:
      record: Of one step; ``skipped_in_a_row`` is there where steps may be skipped.
      skipped_at_most: Steps in a row.
    """
    step = int(record["step"])
    if not math.isfinite(record.get("held_out_loss", 0.0)):
        raise NotFinite(step, "held_out_loss is")
    in_a_row = int(record.get("skipped_in_a_row", 0))
    if in_a_row > skipped_at_most:
        raise NotFinite(step, f"{in_a_row} steps in a row were")
    bad = [name for name in _WATCHED if not math.isfinite(record.get(name, 0.0))]
    if bad and not in_a_row:
        raise NotFinite(step, f"{' and '.join(bad)} {'are' if bad[1:] else 'is'}")


def are_finite(tree: Any) -> Any:
    """Returns a tree of () bools: whether each leaf is finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def all_finite(tree: Any) -> jax.Array:
    """Returns whether all leaves are finite, () bool."""
    return jnp.stack(jax.tree.leaves(are_finite(tree))).all()


def not_so(found: Any) -> list[str]:
    """Returns the paths of the leaves of ``found`` that are false."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_so in leaves
        if not is_so
    ]


def make_finite_check(replicated: Sharding) -> Callable[[int, Any], None]:
    """Returns ``check(step, state)``, which raises ``NotFinite`` with paths of leaves.

    On several hosts, all of them raise.
    """

    find = jax.jit(are_finite, out_shardings=replicated)

    def check(step: int, state: Any) -> None:
        if bad := not_so(jax.device_get(find(state))):
            more = f" and {len(bad) - 4} leaves more" if bad[4:] else ""
            verb = "are" if bad[1:] else "is"
            raise NotFinite(step, f"{', '.join(bad[:4])}{more} {verb}")

    return check
