"""The example's five optimizers on one text: held-out loss beside state bytes.

    python -m benchmarks.llama_optimizers --data ../shared/data/c4 --steps 300

Each at the example's default learning rate, not tuned: a check that all of them train,
not a race. Layers are unrolled, since optax's galore takes no stacked ones.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import _record
from examples.llama.config import Config, DataConfig, ModelConfig, OptimizerConfig
from examples.llama.optimizers import DEFAULT_RATES
from examples.llama.train import train

Curve = list[tuple[int, float]]  # Step, held-out loss in nats.


def run(name: Any, args: argparse.Namespace, seed: int) -> tuple[dict[str, Any], Curve]:
    """A row of the table, and the held-out curve."""
    config = Config(
        model=ModelConfig(scan_layers=False),
        data=DataConfig(path=args.data),
        optimizer=OptimizerConfig(name=name),
        steps=args.steps,
        seed=seed,
        workdir=args.workdir / f"{name}-{seed}",
        eval_every=args.steps // 6,
        checkpoint_every=args.steps,
        log_every=args.steps,
    )
    start = time.perf_counter()
    result = train(config)
    row = {
        "optimizer": name,
        "learning rate": DEFAULT_RATES[name].matrices,
        "seed": seed,
        "held-out loss": result.held_out_loss,
        "perplexity": result.held_out_perplexity,
        "state bytes": result.state_bytes,
        "of AdamW's": result.state_ratio,
        "seconds": time.perf_counter() - start,
    }
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    curve = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    return row, curve


def plot(curves: dict[str, Curve], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="held-out loss (nats per byte)")
    for name, curve in curves.items():
        axes.plot(*zip(*curve[1:], strict=True), marker="o", label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"))
    args = parser.parse_args()
    rows, curves = [], dict[str, Curve]()
    for name in DEFAULT_RATES:
        for seed in range(args.seeds):
            row, curves[name] = run(name, args, seed)
            rows.append(row)
            _record.save("llama_optimizers", rows)
    path = _record.RESULTS / "llama_optimizers.png"
    plot(curves, path)
    print(f"\n{_record.table(rows)}\n\nCurves in {path.name}.")


if __name__ == "__main__":
    main()
