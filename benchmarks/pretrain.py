"""Whole runs of the example's trainer, one for each optimizer, rate and seed.

    python -m benchmarks.pretrain 20m --optimizers adamw lorapre_adamw --rates 1e-3 \
        --preset 20m --data DIR --tokenizer bpe --vocab-size 8192 --steps 1200
    python -m benchmarks.pretrain 60m --optimizers adamw lorapre_adamw --rates 1e-3 \
        --preset 60m --recipe paper --data DIR --tokenizer FILE

Other options are passed to `python -m examples.llama train`. An interrupted run resumes
where it stopped, and finished runs are not run again. Rows and curves go to results/.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import _record
from examples.llama.commands import parse
from examples.llama.config import Config
from examples.llama.train import train


def row_of(config: Config) -> dict[str, Any]:
    """Runs or resumes one run; returns its results and its held-out curve."""
    result = train(config)
    log = (config.workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    curve = [[r["step"], r["held_out_loss"]] for r in records if "held_out_loss" in r]
    return {
        "optimizer": config.optimizer.name,
        "rate": config.optimizer.learning_rate,
        "rank": config.optimizer.rank,
        "seed": config.seed,
        "held-out loss": result.held_out_loss,
        "perplexity": result.held_out_perplexity,
        "state bytes": result.state_bytes,
        "of AdamW's": result.state_ratio,
        "curve": curve,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws held-out loss against the step, without the start of the curves."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="held-out loss, nats per token")
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        skip = len(steps) // 10 + 1
        label = f"{row['optimizer']}, {row['rate']:g}, seed {row['seed']}"
        axes.plot(steps[skip:], losses[skip:], marker=".", label=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the results")
    parser.add_argument("--optimizers", nargs="+", required=True)
    parser.add_argument(
        "--rates", nargs="+", required=True, help="learning rates of each optimizer"
    )
    parser.add_argument("--seeds", nargs="+", default=["0"])
    args, settings = parser.parse_known_args()
    rows, rules = [], [_record.OF_TRAINER[name] for name in args.optimizers]
    for each in itertools.product(args.optimizers, args.rates, args.seeds):
        optimizer, rate, seed = each
        workdir = Path("runs") / f"pretrain_{args.name}" / "-".join(each)
        own = ["--optimizer", optimizer, "--learning-rate", rate, "--seed", seed]
        command: Any = parse(["train", *settings, *own, "--workdir", str(workdir)])
        rows.append(row_of(command.config))
        _record.save(f"pretrain_{args.name}", rows, rules)
        plot(rows, _record.RESULTS / f"pretrain_{args.name}.png")
    print(_record.table([{k: r[k] for k in r if k != "curve"} for r in rows]))


if __name__ == "__main__":
    main()
