"""The transforms under test, and trees on which their factored path runs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorapre_jax as lp

PAPER = lp.AlgorithmOne()

# An attention projection with fused heads, stacked layers and a plain matrix. Equal
# matrix shapes share what is compiled.
SHAPES = {"heads": (12, 2, 4), "stack": (3, 12, 8), "w": (12, 8)}
MATRICES = lp.select_matrices(
    axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^(stack|w)$": lp.MatrixAxes()}
)
FACTORED = frozenset(SHAPES)
STATIC_ARGS = ("rank",)  # What `optax.inject_hyperparams` has to be told.


@dataclasses.dataclass(frozen=True)
class Case:
    """One transform with arguments that factor every leaf of `SHAPES`.

    Attributes:
      factory, kwargs: `factory(**kwargs)` is the transform.
      reference: optax's transform of that kind.
      fields: Pairs of names of a dense tree and of its factors, in the state.
      decay: Name of the argument that is the (first) decay rate.
      only_matrices: Whether it refuses other leaves.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any]
    reference: optax.GradientTransformation
    fields: tuple[tuple[str, str], ...]
    decay: str
    only_matrices: bool = False

    @property
    def is_alias(self) -> bool:
        return "learning_rate" in self.kwargs

    def make(self, **overrides) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.kwargs | overrides)

    def make_optimizer(self, learning_rate: optax.ScalarOrSchedule, **overrides):
        """Returns a transform that descends, for an alias and for a `scale_by_*`."""
        if self.is_alias:
            return self.make(learning_rate=learning_rate, **overrides)
        scale = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(self.make(**overrides), scale)

    def tree(self, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """Returns random parameters or gradients: the three matrices and a vector."""
        shapes = SHAPES if self.only_matrices else SHAPES | {"bias": (8,)}
        return random_tree(shapes, seed, dtype)


ADAM = (("mu", "mu_factors"), ("nu", "nu_factors"))
MUON = (("momentum", "momentum_factors"),)
EMA = (("ema", "ema_factors"),)
COMMON = {"rank": 2, "matrices": MATRICES}

CASES = {
    "adamw": Case(
        lp.lorapre_adamw,
        COMMON | {"learning_rate": 0.01},
        optax.adamw(0.01),
        ADAM,
        "b1",
    ),
    "adam": Case(lp.scale_by_lorapre_adam, COMMON, optax.scale_by_adam(), ADAM, "b1"),
    "adam_paper": Case(
        lp.scale_by_lorapre_adam,
        COMMON | {"first_moment": PAPER, "second_moment": PAPER},
        optax.scale_by_adam(),
        ADAM,
        "b1",
    ),
    "adam_dense_first": Case(
        lp.scale_by_lorapre_adam,
        COMMON | {"first_moment": lp.Dense(), "second_moment": lp.LowRank()},
        optax.scale_by_adam(),
        ADAM,
        "b1",
    ),
    "muon": Case(
        lp.lorapre_muon,
        COMMON | {"learning_rate": 0.01},
        optax.contrib.muon(0.01, nesterov=False),  # Plain Adam for what is no matrix.
        MUON,
        "beta",
    ),
    "scale_by_muon": Case(
        lp.scale_by_lorapre_muon,
        COMMON,
        optax.contrib.scale_by_muon(
            weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}
        ),
        MUON,
        "beta",
        only_matrices=True,
    ),
    "ema": Case(lp.lorapre_ema, COMMON | {"decay": 0.9}, optax.ema(0.9), EMA, "decay"),
}
ALIASES = [name for name, case in CASES.items() if case.is_alias]
TRANSFORMS = [name for name, case in CASES.items() if not case.is_alias]


def random_tree(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in shapes.items()
    }


def plan_of(state: Any) -> Any:
    """The plan in a state; of the two that the alias of Muon has, that of the matrices,
    since partitions are sorted by name."""
    return optax.tree_utils.tree_get_all_with_path(state, "plan")[-1][1]


def factored_paths(tx: optax.GradientTransformation, params: Any) -> frozenset[str]:
    """The paths that `describe` reports as factored, for tests that rely on them."""
    report = lp.describe(tx, params)
    return frozenset(leaf.path for leaf in report.leaves if leaf.is_factored)


def run(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Iterable[Any],
    jit: bool = False,
) -> tuple[list[Any], Any]:
    """The updates for a sequence of gradients (parameters fixed), the last state.

    Op by op, unless told: then equal shapes are compiled once for all transforms.
    """
    update: Any = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    all_updates = []
    for grad in grads:
        updates, state = update(grad, state, params)
        all_updates.append(updates)
    return all_updates, state


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6):
    """Asserts the same structure and dtypes, and values within tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(jax.tree.leaves(actual), paths, strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == e.dtype, name
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(e, np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=name,
        )


def assert_same(actual: Any, expected: Any):
    """Asserts that two trees are the same bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(jax.tree.leaves(actual), paths, strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == e.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e), err_msg=name)


def gradients(case: Case, steps: int = 3, dtype: Any = jnp.float32) -> list[Any]:
    return [case.tree(seed, dtype) for seed in range(1, steps + 1)]


def only_w(case: Case, **overrides) -> optax.GradientTransformationExtraArgs:
    return case.make(matrices=lp.MatrixAxes(), **overrides)


def w_trees(*seeds: int) -> list[dict[str, jax.Array]]:
    return [random_tree({"w": (12, 8)}, seed) for seed in seeds]


def is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)
