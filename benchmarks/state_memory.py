"""The optimizer state of the published Llamas, counted by `lp.describe`.

python -m benchmarks.state_memory
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

import lorapre_jax as lp
from benchmarks import _record

# Width, feed-forward width, layers, and the rank of the published tables.
SIZES = {
    "60M": (512, 1376, 8, 128),
    "130M": (768, 2048, 12, 256),
    "350M": (1024, 2736, 24, 256),
    "1B": (2048, 5461, 24, 512),
    "7B": (4096, 11008, 32, 1024),
}
VOCABULARY = 32_000
PAPER = lp.AlgorithmOne()
RULES = ("paper/8", "default/8", "default_all/8")
"""The race's names for these rules."""
MATRICES = lp.select_matrices("attention|mlp", axes=lp.MatrixAxes(-2, -1))


def llama(width, ffn, layers, dtype=jnp.float32):
    """Returns abstract parameters with stacked layers."""
    shapes = {f"attention/{name}": (layers, width, width) for name in "qkvo"}
    shapes |= {f"mlp/{name}": (layers, width, ffn) for name in ("gate", "up")}
    shapes |= {"mlp/down": (layers, ffn, width), "norms": (layers, 2, width)}
    shapes |= {"embed": (VOCABULARY, width), "head": (width, VOCABULARY)}
    shapes |= {"norm": (width,)}
    return {name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()}


def transforms(rank):
    shared: dict[str, Any] = {"matrices": MATRICES}
    return {
        f"paper, r = {rank}": lp.scale_by_lorapre_adam(
            rank, first_moment=PAPER, second_moment=PAPER, **shared
        ),
        f"default, r = {rank}": lp.scale_by_lorapre_adam(rank, **shared),
        f"default, r = {rank // 8}": lp.scale_by_lorapre_adam(rank // 8, **shared),
        # By default the embedding and the head too, as `default_all` in the race.
        f"default, r = {rank // 8}, embedding and head too": lp.scale_by_lorapre_adam(
            rank // 8
        ),
    }


def main() -> None:
    rows = []
    for size, (*shape, rank) in SIZES.items():
        params = llama(*shape)
        for name, tx in transforms(rank).items():
            start = time.perf_counter()
            report = lp.describe(tx, params)
            seconds = time.perf_counter() - start
            factored = [leaf for leaf in report.leaves if leaf.is_factored]
            mine = sum(leaf.nbytes for leaf in factored)
            adamw = sum(leaf.adamw_nbytes for leaf in factored)
            rows.append(
                {
                    "model": size,
                    "method": name,
                    "AdamW GB": report.adamw_bytes / 1e9,
                    "ours GB": report.total_bytes / 1e9,
                    "ratio": report.ratio,
                    "ratio, factored leaves alone": mine / adamw,
                    "describe s": seconds,
                }
            )
    print(_record.table(rows))
    print(f"\nWritten to {_record.save('state_memory', rows, RULES).name}.")


if __name__ == "__main__":
    main()
