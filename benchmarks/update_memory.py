"""The temporaries of one update of a stacked leaf, from the compiler's own analysis.

The gradient and the state are arguments and are donated, as in training. The rows have
the memory that the update needs besides, in units of the leaf and of one slice. Nothing
is run, so any size can be measured.

    python -m benchmarks.update_memory
"""

from typing import Any

import jax
import optax

import lorapre_jax as lp
from benchmarks import _record

LAYERS, P, Q, RANK = 24, 1024, 2736, 256  # The feed-forward stack of a 350M Llama.
PAPER = lp.AlgorithmOne()
RULES = ("adamw", "default/8", "paper/8", "default_muon/8")
"""The race's names for these rules."""


def transforms(slices):
    shared: dict[str, Any] = {
        "rank": RANK,
        "matrices": lp.MatrixAxes(-2, -1),
        "slices_at_once": slices,
    }
    return {
        "lorapre_adam, default": lp.scale_by_lorapre_adam(**shared),
        "lorapre_adam, paper": lp.scale_by_lorapre_adam(
            first_moment=PAPER, second_moment=PAPER, **shared
        ),
        "lorapre_muon": lp.scale_by_lorapre_muon(**shared),
    }


def measure(tx, dtype="float32") -> dict[str, float]:
    """Returns the memory of the compiled update, in units of the leaf."""
    leaf = jax.ShapeDtypeStruct((LAYERS, P, Q), dtype)
    state = jax.eval_shape(tx.init, leaf)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    memory: Any = update.lower(leaf, state).compile().memory_analysis()
    nbytes = leaf.size * leaf.dtype.itemsize
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # An output that could not take a donated buffer is transient memory as well.
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "state / leaf": state_bytes / nbytes,
        "temporaries / leaf": memory.temp_size_in_bytes / nbytes,
        "temporaries / slice": memory.temp_size_in_bytes / nbytes * LAYERS,
        "fresh outputs / leaf": fresh / nbytes,
    }


def main() -> None:
    rows = [{"transform": "optax adam", "batch": "-", **measure(optax.scale_by_adam())}]
    for slices in (None, 8, 2, 1):
        for name, tx in transforms(slices).items():
            kind = "vmapped" if slices is None else f"slices of {slices}"
            rows.append({"transform": name, "batch": kind, **measure(tx)})
    print(f"Leaf: {LAYERS} x {P} x {Q} float32, rank {RANK}\n\n{_record.table(rows)}")
    print(f"\nWritten to {_record.save('update_memory', rows, RULES).name}.")


if __name__ == "__main__":
    main()
