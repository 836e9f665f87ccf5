"""Times the parts of a training step, for all optimizers in one process.

    python -m benchmarks.step_time --preset 60m --rank 128 --micro-batch-size 8

It times the gradient of a micro-batch, the update, and a whole step of one micro-batch,
all compiled beforehand. The optimizers take turns, and each round begins with another
one. The rows have medians, and the range of the ratios over the rounds. The time of a
step with the published batch of 512 rows, which no CPU can hold, is computed from the
first two. Memory is the compiler's own count. optax's GaLore is not included, because
it does not take the stacked layers that all others have here.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _record
from examples.llama import layout
from examples.llama.config import PRESETS, OptimizerConfig, OptimizerName
from examples.llama.data.rows import Batch
from examples.llama.gradients import make_loss_and_grads
from examples.llama.optimizers import make_optimizer
from examples.llama.pure import PureLlama
from examples.llama.steps import abstract_state, init_state, make_train_step

NAMES: tuple[OptimizerName, ...] = ("adamw", "lorapre_adamw", "lorapre_muon", "muon")
PUBLISHED_ROWS = 512
SEQ_LEN, VOCAB_SIZE = 256, 32_000


class Subject:
    """One optimizer's state and its compiled functions.

    The gradient of the batch is computed in parts of `micro` rows, all at once if None.
    """

    def __init__(
        self,
        preset: str,
        optimizer: OptimizerConfig,
        batch: Batch,
        micro: int | None = None,
    ):
        mesh = layout.make_mesh("", jax.devices()[:1])
        model = PureLlama(PRESETS[preset], VOCAB_SIZE, mesh)
        tx = make_optimizer(optimizer, steps=1000)
        loss_and_grads = make_loss_and_grads(model, micro)
        step = make_train_step(loss_and_grads, tx, abstract_state(model, tx, mesh))
        init = jax.jit(functools.partial(init_state, model, tx))
        self.state, self.batch = init(jax.random.key(0)), batch
        params = self.state.params

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Any, opt_state: Any, grads: Any) -> Any:
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.gradient = jax.jit(loss_and_grads).lower(params, batch).compile()
        self.update = update.lower(params, self.state.opt_state, params).compile()
        lowered = step.lower(self.state, batch)
        self.compile_seconds, self.step = _timed(lowered.compile)
        self.times: dict[str, list[float]] = {"gradient": [], "update": [], "step": []}

    def measure(self) -> None:
        """Times each part once."""
        params, opt_state = self.state.params, self.state.opt_state
        seconds, found = _timed(lambda: self.gradient(params, self.batch))
        self.times["gradient"].append(seconds)
        seconds, new = _timed(lambda: self.update(params, opt_state, found[1]))
        self.times["update"].append(seconds)
        # The update was donated the old arrays.
        state = self.state._replace(params=new[0], opt_state=new[1])
        seconds, (self.state, _) = _timed(lambda: self.step(state, self.batch))
        self.times["step"].append(seconds)

    @property
    def peak_bytes(self) -> int:
        found: Any = self.step.memory_analysis()
        kept = found.argument_size_in_bytes + found.output_size_in_bytes
        return kept - found.alias_size_in_bytes + found.temp_size_in_bytes


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    return time.perf_counter() - start, result


def random_batch(rows: int, seq_len: int = SEQ_LEN) -> Batch:
    shape = (rows, seq_len)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones(shape, np.float32))
    return jax.device_put(batch)


def take_turns(subjects: Sequence[Subject], repeats: int) -> None:
    """Measures each, after a warm-up; each round begins with another one."""
    for subject in subjects:
        subject.measure()
        subject.times = {name: [] for name in subject.times}
    for turn in range(repeats):
        first = turn % len(subjects)
        for subject in (*subjects[first:], *subjects[:first]):
            subject.measure()


def rows_of(subjects: Mapping[str, Subject]) -> list[dict[str, Any]]:
    """Returns medians, and their ratios to those of the first, AdamW."""
    # The gradient is the same for every optimizer, and so is its time.
    all_times = [t for subject in subjects.values() for t in subject.times["gradient"]]
    gradient = statistics.median(all_times)
    rows_of_batch, seq_len = next(iter(subjects.values())).batch.inputs.shape
    rows = []
    for name, subject in subjects.items():
        update, step = (statistics.median(subject.times[x]) for x in ("update", "step"))
        composed = PUBLISHED_ROWS / rows_of_batch * gradient + update
        rows.append(
            {
                "optimizer": name,
                "rows": rows_of_batch,
                "gradient s": gradient,
                "update s": update,
                "step s": step,
                "tokens/s": rows_of_batch * seq_len / step,
                "published step (composed) s": composed,
                "peak MB": subject.peak_bytes / 1e6,
                "compile s": subject.compile_seconds,
            }
        )
    columns = ("update s", "step s", "tokens/s", "published step (composed) s")
    base = rows[0]
    for row in rows:
        ratios = {x: row[x] / base[x] for x in (*columns, "peak MB")}
        row |= {f"{name.removesuffix(' s')}, ratio": x for name, x in ratios.items()}
        for part in ("update", "step"):
            turns = zip(
                subjects[row["optimizer"]].times[part],
                subjects[base["optimizer"]].times[part],
                strict=True,
            )
            paired = [mine / theirs for mine, theirs in turns]
            row[f"{part}, ratio, range"] = f"{min(paired):.3f} to {max(paired):.3f}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    batch = random_batch(args.micro_batch_size)
    subjects = {
        name: Subject(args.preset, OptimizerConfig(name, rank=args.rank), batch)
        for name in NAMES
    }
    take_turns(list(subjects.values()), args.repeats)
    rows = rows_of(subjects)
    print(_record.table(rows))
    rules = [_record.OF_TRAINER[name] for name in NAMES]
    name = f"step_time_{args.preset}_{jax.devices()[0].platform}"
    print(_record.save(name, rows, rules))


if __name__ == "__main__":
    main()
