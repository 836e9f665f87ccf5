"""Follows the factors over 20,000 steps of a small model.

    python -m benchmarks.quality.long_run --data DIR

The rows have the loss, the norm and the condition of the factored first moments, and
how far the left factors are from orthonormal, `max |B^T B - I|`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record
from benchmarks.quality import jobs
from benchmarks.quality.conditions import Condition
from benchmarks.quality.methods import METHODS
from benchmarks.quality.run import Race
from benchmarks.quality.scales import SCALES, load_texts
from examples.llama.config import ModelConfig
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows

MODEL = ModelConfig(
    width=64, ffn_width=176, num_layers=1, num_heads=2, scan_layers=False
)
METHODS_FOLLOWED = ("adamw", "default/8", "default_muon/8")


def main() -> None:
    parser = jobs.texts_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS_FOLLOWED)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--log-every", type=int, default=2000)
    args = parser.parse_args()
    scale = dataclasses.replace(
        SCALES[args.scale], model=MODEL, batch_size=4, seq_len=64
    )
    texts = load_texts(scale, args.data, "choose", args.cache)
    lines = []
    for name in args.methods:
        race = Race(scale, METHODS[name], Condition(), texts)
        lines += follow(race, name, args.steps, args.log_every)
        print(_record.table(lines))
    print(_record.save(f"quality/long_run_{args.scale}", lines, args.methods))


def follow(race: Race, name: str, steps: int, log_every: int) -> list[dict]:
    state, lines = race.init(0), []
    rate = 2e-3 if "muon" not in name else 5e-3
    rates = dict.fromkeys(race.rules, np.float32(rate))
    scale = race.scale
    rows = PackedRows(race.texts.train, scale.seq_len)
    batches = train_batches(rows, scale.batch_size, 0)
    losses = []
    for step in range(1, steps + 1):
        state, loss = race.train_step(state, batches[step - 1], rates)
        losses.append(loss)
        if step % log_every == 0:
            mean = float(np.mean(jax.device_get(losses)))
            losses.clear()
            lines.append(
                {"method": name, "step": step, "loss": mean, **_health(race, state)}
            )
    return lines


def _health(race: Race, state) -> dict[str, float | None]:
    """Returns the largest norm, condition and orthogonality error of all matrices.

    They are None without factors.
    """
    pairs = [
        x
        for x in jax.tree.leaves(state.rules, is_leaf=lambda x: hasattr(x, "left"))
        if hasattr(x, "left")
    ]
    if not pairs:
        return dict.fromkeys(("norm", "condition", "orthogonality"))
    norms, conditions, errors = [], [], []
    for pair in pairs:
        gram = jnp.matmul(jnp.swapaxes(pair.left, -1, -2), pair.left)
        errors.append(jnp.max(jnp.abs(gram - jnp.eye(gram.shape[-1]))))
        values = jnp.linalg.svd(pair.right, compute_uv=False)
        norms.append(jnp.max(values))
        conditions.append(jnp.max(values[..., 0] / values[..., -1]))
    return {
        "norm": float(max(norms)),
        "condition": float(max(conditions)),
        "orthogonality": float(max(errors)),
    }


if __name__ == "__main__":
    main()
