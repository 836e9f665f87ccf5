"""One run of the race: a method, its rates and a seed, to a held-out loss."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.conditions import Condition
from benchmarks.quality.rules import Method, adam
from benchmarks.quality.scales import Scale, Texts
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import Batch, PackedRows, held_out_batches
from examples.llama.optimizers import schedule
from examples.llama.pure import PureLlama
from examples.llama.steps import make_evaluation

WARMUP = 0.1
EVALUATIONS = 6
Leaves = dict[str, jax.Array]


class State(NamedTuple):
    params: Leaves  # By path, as in the groups of leaves that the rules see.
    rules: dict[str, Any]
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Race:
    """What the runs of one method under one condition have in common."""

    scale: Scale
    method: Method
    condition: Condition
    texts: Texts

    @functools.cached_property
    def model(self) -> PureLlama:
        return PureLlama(self.scale.model, self.texts.vocab_size)

    @functools.cached_property
    def rules(self) -> dict[str, optax.GradientTransformation]:
        width, b2 = self.scale.model.width, self.condition.b2
        return {
            "matrices": self.method.matrices(width, b2),
            "embeddings": (self.method.embeddings or adam)(width, b2),
            "norms": adam(width, b2),
        }

    @functools.cached_property
    def structure(self) -> Any:
        return jax.tree.structure(
            jax.eval_shape(self.model.init, jax.random.key(0)),
        )

    def init(self, seed: int) -> State:
        tree = self.model.init(jax.random.key(seed))
        params = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.astype(
                self.condition.param_dtype
            )
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        # Rules see gradients in float32, so their states are initialised in it.
        wide = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}
        rules = {name: rule.init(pick(wide, name)) for name, rule in self.rules.items()}
        return State(params, rules, jnp.zeros((), jnp.int32))

    def tree(self, params: Leaves) -> Any:
        """Returns the model's tree; the paths were made from it, in its order."""
        return jax.tree.unflatten(self.structure, list(params.values()))

    def apply(self, state: State, grads: Leaves, rates: Mapping[str, Any]) -> State:
        """Subtracts from every group its rule's direction times the group's rate."""
        params, rules = dict(state.params), {}
        grads = {path: g.astype(jnp.float32) for path, g in grads.items()}
        directions: Any
        for name, rule in self.rules.items():
            directions, rules[name] = rule.update(
                pick(grads, name), state.rules[name], pick(state.params, name)
            )
            for path, direction in directions.items():
                moved = params[path] - rates[name] * direction
                params[path] = moved.astype(params[path].dtype)
        return State(params, rules, state.step + 1)

    def gradient(self, params: Leaves, batch: Batch) -> tuple[jax.Array, Leaves]:
        """Returns the scaled mean loss of a batch without padding, and its gradient."""

        def loss(params: Leaves) -> jax.Array:
            tree = self.tree(params)
            losses = self.model.losses(tree, batch.inputs, batch.targets)
            return losses.mean() * self.condition.loss_scale

        return jax.value_and_grad(loss)(params)

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[State, jax.Array]]:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: State, batch: Batch, rates: Mapping[str, jax.Array]):
            loss, grads = self.gradient(state.params, batch)
            state = self.apply(state, self.condition.alter(grads, state.step), rates)
            return state, loss / self.condition.loss_scale

        return step

    @functools.cached_property
    def evaluations(self) -> dict[str, Callable[[Leaves], float]]:
        length = self.scale.seq_len
        return {
            name: self._evaluation(
                list(held_out_batches(PackedRows(tokens, length, pad=0), 16))
            )
            for name, tokens in self.texts.held_out.items()
        }

    def _evaluation(self, batches: list[Batch]) -> Callable[[Leaves], float]:
        evaluate = make_evaluation(self.model, jax.device_put(batches))
        return lambda params: evaluate(self.tree(params))

    def run(self, rate: float, dense_rate: float, seed: int, steps: int) -> dict:
        """Returns the fields of a row; a run that diverges stops, with loss None."""
        state = self.init(seed)
        start = time.perf_counter()
        peaks = {"matrices": rate, "embeddings": dense_rate, "norms": dense_rate}
        shape = schedule(1.0, WARMUP, steps)
        size = self.condition.rows or self.scale.batch_size
        rows = PackedRows(self.texts.train, self.scale.seq_len)
        batches = train_batches(rows, size, seed)
        first = next(iter(self.evaluations))
        curve, losses = [], []
        for step in range(1, steps + 1):
            now = np.asarray(shape(step - 1))
            rates = {name: np.float32(now * peak) for name, peak in peaks.items()}
            state, loss = self.train_step(state, batches[step - 1], rates)
            losses.append(loss)
            if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
                held_out = self.evaluations[first](state.params)
                curve.append((step, held_out))
                if not math.isfinite(held_out):
                    break
        seconds = time.perf_counter() - start
        finite = all(math.isfinite(value) for _, value in curve)
        others = list(self.evaluations)[1:] if finite else []
        train = np.asarray(jax.device_get(losses), np.float64)
        return {
            "loss": curve[-1][1] if finite else None,
            "held_out": first,
            "texts": self.texts.digest,
            "other_losses": {n: self.evaluations[n](state.params) for n in others},
            "train_loss": float(train[-steps // 12 :].mean()) if finite else None,
            "curve": [point for point in curve if math.isfinite(point[1])],
            "state_bytes": {n: _bytes(state.rules[n]) for n in self.rules},
            "params": {n: _count(pick(state.params, n)) for n in self.rules},
            "seconds": round(seconds, 1),
        }


def pick(leaves: Leaves, group: str) -> Leaves:
    return {path: leaf for path, leaf in leaves.items() if group_of(path) == group}


def group_of(path: str) -> str:
    if path.startswith("layers/") and path.endswith("kernel"):
        return "matrices"
    return "norms" if path.endswith("scale") else "embeddings"


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
