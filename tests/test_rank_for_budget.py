"""The largest rank in a budget fits, and the next rank does not."""

import functools
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
from test_describe import llama_7b

import lorapre_jax as lp

SHAPES = {"stack": (3, 40, 24), "heads": (24, 4, 5), "w": (12, 64), "bias": (24,)}
PARAMS = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in SHAPES.items()}
MATRICES = lp.select_matrices(
    axes={"stack|w": lp.MatrixAxes(), "heads": lp.MatrixAxes(0, (1, 2))}
)
SIDES = (24, 20, 12)
PAPER = lp.AlgorithmOne()
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"factor_dtype": "bfloat16"},
    "float64": {"factor_dtype": "float64"},
    "paper": {"first_moment": PAPER, "second_moment": PAPER},
    "dense second": {"second_moment": lp.Dense()},
    "dense first": {"first_moment": lp.Dense(), "second_moment": PAPER},
    "adamw": {"transform": functools.partial(lp.lorapre_adamw, 0.1)},
    "ema": {"transform": functools.partial(lp.lorapre_ema, 0.9)},
    "muon": {"transform": functools.partial(lp.lorapre_muon, lambda _: 0.1)},
    "muon float64": {
        "transform": functools.partial(lp.lorapre_muon, 0.1),
        "factor_dtype": "float64",
    },
}


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def report(rank, transform=lp.scale_by_lorapre_adam, **options):
    return lp.describe(transform(rank=rank, matrices=MATRICES, **options), PARAMS)


@pytest.mark.parametrize("rule", RULES)
def test_the_largest_that_fits(rule):
    """Compares with trying all ranks, for budgets from too small to large."""
    options = RULES[rule]
    # The ranks change at these shares only.
    shares = sorted({Fraction(k, side) for side in SIDES for k in range(1, side + 1)})
    tried = [(share, report(share, **options)) for share in shares]
    paying = [x for x in tried if sum(leaf.is_factored for leaf in x[1].leaves) == 3]
    sizes = [x.total_bytes for _, x in paying]
    assert sizes == sorted(sizes)
    least, most = sizes[0], sizes[-1]
    budgets = [*np.linspace(least, most - 1, 7, dtype=int).tolist(), most, 10**9]
    ranks = [
        lp.rank_for_budget(nbytes, PARAMS, MATRICES, **options) for nbytes in budgets
    ]
    for nbytes, rank in zip(budgets, ranks, strict=True):
        assert rank == max(share for share, x in paying if x.total_bytes <= nbytes)
        assert report(rank, **options).total_bytes <= nbytes
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-2] == ranks[-1]
    with pytest.raises(ValueError, match=f"rank one the state takes {least:,}"):
        lp.rank_for_budget(least - 1, PARAMS, MATRICES, **options)


def test_a_budget_beyond_all_ranks_keeps_matrices_factored():
    rank = lp.rank_for_budget(10**12, PARAMS, MATRICES)
    assert rank >= Fraction(1, 2)
    assert [leaf.path for leaf in report(rank).leaves if leaf.is_factored] == [
        "heads",
        "stack",
        "w",
    ]


def test_the_rank_is_static_and_what_a_transform_takes():
    rank = lp.rank_for_budget(9_000, PARAMS, MATRICES)
    assert isinstance(rank, Fraction)
    tx = lp.lorapre_adamw(0.1, rank, matrices=MATRICES)
    state = jax.eval_shape(tx.init, PARAMS)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= 9_000


def test_default_rule_needs_sides_of_128():
    params = {"w": jax.ShapeDtypeStruct((128, 256), "float32"), "v": PARAMS["w"]}
    dense = 2 * 12 * 64 * 4
    rank = lp.rank_for_budget(dense + 4 + 4 * (384 * (1 + 10) + 10) + 3, params)
    assert rank == Fraction(10, 128)
    with pytest.raises(ValueError, match="no leaf is factored"):
        lp.rank_for_budget(10**9, params, min_dim_size_to_factor=129)


def test_an_abstract_7b_model():
    params, matrices = llama_7b(), lp.select_matrices(r"attention|mlp")
    rank = lp.rank_for_budget(4 * 2**30, params, matrices)
    used = [
        lp.describe(lp.lorapre_adamw(0.1, r, matrices=matrices), params).total_bytes
        for r in (rank, rank + Fraction(1, 4096))
    ]
    assert used[0] <= 4 * 2**30 < used[1]


@pytest.mark.parametrize(
    ("nbytes", "error", "message"),
    [
        (2e9, TypeError, "`nbytes` must be an int"),
        (True, TypeError, "`nbytes` must be an int"),
        (-1, ValueError, "`nbytes` must be at least 0"),
        (
            1000,
            ValueError,
            r"the budget is 1,000 bytes, but at rank one the state takes [\d,]+, 192 "
            r"of them for dense leaves: 'bias' \(192; not two axes\)\. R",
        ),
    ],
)
def test_errors(nbytes, error, message):
    with pytest.raises(error, match=message):
        lp.rank_for_budget(nbytes, PARAMS, MATRICES)


def test_errors_say_what_takes_most():
    """At most four dense leaves are listed, by size."""
    params = {f"b{i}": jax.ShapeDtypeStruct((i,), "float32") for i in range(1, 7)}
    params |= {"w": PARAMS["w"]}
    matrices = lp.select_matrices("w")
    with pytest.raises(ValueError, match=r"'b6' \(48; .* 'b3' \(24; .*\) and 2 more"):
        lp.rank_for_budget(0, params, matrices)
    with pytest.raises(ValueError, match=r"takes \d+, 0 of them for dense leaves\. R"):
        lp.rank_for_budget(0, {"w": PARAMS["w"]}, matrices)
    with pytest.raises(ValueError, match="no leaf is factored"):
        lp.rank_for_budget(10**9, PARAMS, lp.select_matrices(exclude="w"))
