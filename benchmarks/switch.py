"""Measures how the loss changes if an AdamW run changes to LoRA-Pre and back.

    python -m benchmarks.switch --data DIR/c4

The model is the Llama of scale (a) of the race, on a mesh of eight CPU devices,
fsdp=4,tensor=2. The optimizer changes after a third and after two thirds of the steps,
with `lp.convert_state` ("converted") or with a fresh state ("fresh"). Two further runs
have AdamW or LoRA-Pre throughout. All runs take the same batches at one constant rate.

Consider the mean training loss of a run over 20 steps, minus that of the AdamW run over
the same steps. A bump is this difference for the 20 steps after a change, minus that
for the 20 steps before it. Rows with the curves go to results/switch.json, and the
figure to results/switch.png.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorapre_jax as lp
from benchmarks import _record
from benchmarks.quality.scales import SCALES, read_texts, token_stream
from examples.llama import layout
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import Batch, PackedRows
from examples.llama.data.tokenizers import ByteTokenizer
from examples.llama.gradients import make_loss_and_grads
from examples.llama.optimizers import MATRICES
from examples.llama.pure import PureLlama
from examples.llama.steps import TrainState, abstract_state, init_state, make_train_step

RATE, RANK, WINDOW, B1, B2 = 1e-3, 16, 20, 0.9, 0.95
Phase = tuple[str, bool]
"""The optimizer of a third of the run, and whether its state is fresh."""
RUNS: dict[str, list[Phase]] = {
    "AdamW": [("adamw", True), ("adamw", False), ("adamw", False)],
    "LoRA-Pre": [("lorapre", True), ("lorapre", False), ("lorapre", False)],
    "converted": [("adamw", True), ("lorapre", False), ("adamw", False)],
    "fresh": [("adamw", True), ("lorapre", True), ("adamw", True)],
}


def optimizer(name: str) -> optax.GradientTransformation:
    matrices = lp.select_matrices(MATRICES, axes=lp.MatrixAxes(-2, -1))
    rules = {
        "adamw": optax.adamw(RATE, B1, B2, weight_decay=0.0),
        "lorapre": lp.lorapre_adamw(RATE, RANK, B1, B2, matrices=matrices),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), rules[name])


class Trainer:
    """The model on its mesh, and the batches that every run takes."""

    def __init__(self, data: Path | None, steps: int):
        scale = SCALES["a"]
        self.steps, tokenizer = steps, ByteTokenizer()
        texts = read_texts(data, "train")[: 20 * steps]
        self.model = PureLlama(scale.model, tokenizer.vocab_size)
        self.mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
        rows = PackedRows(token_stream(texts, tokenizer), scale.seq_len)
        self._batches = train_batches(rows, scale.batch_size, 0)
        self._by_row = layout.by_row(self.mesh, scale.batch_size)

    def batch(self, step: int) -> Batch:
        return jax.device_put(self._batches[step], self._by_row)

    def run(self, phases: list[Phase]) -> np.ndarray:
        """Returns the training loss of every step."""
        losses, state = [], None
        third = self.steps // len(phases)
        for i, (name, fresh) in enumerate(phases):
            tx = optimizer(name)
            abstract = abstract_state(self.model, tx, self.mesh)
            state = self._begin(state, tx, abstract, fresh)
            step = make_train_step(make_loss_and_grads(self.model), tx, abstract)
            for now in range(i * third, (i + 1) * third):
                state, metrics = step(state, self.batch(now))
                # Wait for it, since eight devices share the threads of one machine.
                losses.append(float(metrics["train_loss"]))
        return np.asarray(losses)

    def _begin(
        self, state: Any, tx: Any, abstract: TrainState, fresh: bool
    ) -> TrainState:
        places = jax.tree.map(lambda x: x.sharding, abstract)
        if state is None:
            init = functools.partial(init_state, self.model, tx)
            return jax.jit(init, out_shardings=places)(jax.random.key(0))
        if fresh:
            init = jax.jit(tx.init, out_shardings=places.opt_state)
            return state._replace(opt_state=init(state.params))
        converted = lp.convert_state(state.opt_state, tx, state.params, b1=B1, b2=B2)
        return state._replace(opt_state=converted)


def bump(losses: np.ndarray, reference: np.ndarray, change: int) -> float:
    excess = losses - reference
    after = excess[change : change + WINDOW].mean()
    return float(after - excess[change - WINDOW : change].mean())


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
    """Draws the loss minus that of the AdamW run, as means over WINDOW steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        excess = (losses - curves["AdamW"]).reshape(-1, WINDOW).mean(1)
        axes.plot(np.arange(1, len(excess) + 1) * WINDOW, excess, label=name)
    for change in (len(losses) // 3, 2 * len(losses) // 3):
        axes.axvline(change, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="training loss minus AdamW's, nats per byte")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="default: Python's own library")
    parser.add_argument("--steps", type=int, default=360)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    matplotlib.use("agg")
    trainer = Trainer(args.data, args.steps)
    curves = {name: trainer.run(phases) for name, phases in RUNS.items()}
    third = args.steps // 3
    rows = [
        {
            "run": name,
            "bump at the first change": bump(losses, curves["AdamW"], third),
            "at the second": bump(losses, curves["AdamW"], 2 * third),
            "last 20 steps": float(losses[-WINDOW:].mean()),
            "losses": [round(loss, 5) for loss in losses.tolist()],
        }
        for name, losses in curves.items()
    ]
    print(_record.table([{k: v for k, v in r.items() if k != "losses"} for r in rows]))
    plot(curves, _record.RESULTS / "switch.png")
    print(_record.save("switch", rows, ("adamw", "default/8")))


if __name__ == "__main__":
    main()
