"""The optimizers: one rule for the matrices, the same AdamW for all other leaves."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import optax

import lorapre_jax as lp
from benchmarks.architectures.models import Architecture, Params

RANK = Fraction(1, 8)
B1, B2, MUON_BETA, MUON_RMS = 0.9, 0.95, 0.95, 0.2
DECAY = 0.1
PAPER = lp.AlgorithmOne()
Rate = Any  # A number, a tracer or a schedule.


def _adamw(axes: lp.MatrixAxes, rate: Rate) -> Any:
    return optax.adamw(rate, B1, B2, weight_decay=DECAY)


def _lorapre_adamw(axes: lp.MatrixAxes, rate: Rate) -> Any:
    return lp.lorapre_adamw(rate, RANK, B1, B2, weight_decay=DECAY, matrices=axes)


def _paper(axes: lp.MatrixAxes, rate: Rate) -> Any:
    return lp.lorapre_adamw(
        rate,
        RANK,
        B1,
        B2,
        weight_decay=DECAY,
        first_moment=PAPER,
        second_moment=PAPER,
        matrices=axes,
    )


def _muon(axes: lp.MatrixAxes, rate: Rate) -> Any:
    numbers = optax.contrib.MuonDimensionNumbers(axes.rows, axes.columns)
    return optax.contrib.muon(
        rate,
        beta=MUON_BETA,
        weight_decay=DECAY,
        muon_weight_dimension_numbers=lambda x: jax.tree.map(lambda _: numbers, x),
        consistent_rms=MUON_RMS,
    )


def _lorapre_muon(axes: lp.MatrixAxes, rate: Rate) -> Any:
    return lp.lorapre_muon(
        rate,
        RANK,
        MUON_BETA,
        weight_decay=DECAY,
        consistent_rms=MUON_RMS,
        matrices=axes,
    )


RULES: dict[str, Callable[[lp.MatrixAxes, Rate], Any]] = {
    "adamw": _adamw,
    "lorapre_adamw": _lorapre_adamw,
    "lorapre_adamw, paper": _paper,
    "muon": _muon,
    "lorapre_muon": _lorapre_muon,
}


def optimizer(
    architecture: Architecture, rule: str, rate: Rate, dense_rate: Rate
) -> optax.GradientTransformationExtraArgs:
    def labels(params: Params) -> Any:
        def label(path: Any, _: Any) -> str:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return "matrix" if re.search(architecture.matrices, name) else "dense"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition(
        {
            "matrix": RULES[rule](architecture.axes, rate),
            "dense": optax.adamw(dense_rate, B1, B2, weight_decay=0.0),
        },
        labels,
    )


def coverage(architecture: Architecture, rule: str) -> dict[str, float]:
    """Returns the share of factored parameters, and the state as a share of AdamW's.

    Raises:
      AssertionError: No leaf is a matrix, or one of ours leaves a matrix dense.
    """
    params = jax.eval_shape(architecture.init, jax.random.key(0))
    report = lp.describe(optimizer(architecture, rule, 1.0, 1.0), params)
    matrices = {
        x.path for x in report.leaves if re.search(architecture.matrices, x.path)
    }
    factored = {x.path for x in report.leaves if x.is_factored}
    wanted = matrices if rule.startswith("lorapre") else set()
    assert matrices, f"{architecture.matrices!r} matches no leaf."
    assert factored == wanted, f"Not factored as intended: {factored ^ wanted}."
    sizes = {x.path: math.prod(x.shape) for x in report.leaves}
    share = sum(sizes[path] for path in factored) / sum(sizes.values())
    return {"factored share": share, "state ratio": report.ratio}
