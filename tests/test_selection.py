"""Which leaves are factored, along which axes, at which rank."""

import re
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapre_jax as lp
from lorapre_jax._leaves.plan import FactoredLeaf


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "embed": {"embedding": struct(256, 128)},
    "layers": {
        "attention": {"q": struct(4, 128, 2, 64), "o": struct(4, 2, 64, 128)},
        "mlp": struct(4, 128, 384),
        "norm": struct(4, 128),
    },
    "head": struct(128, 256),
    "bias": struct(256),
}


def factored(params: Any = PARAMS, rank: Any = 8, **kwargs):
    """Path -> (batch, p, q, r) of the factored leaves."""
    report = lp.describe(lp.scale_by_lorapre_adam(rank, **kwargs), params)
    return {
        leaf.path: (leaf.batch_shape, leaf.p, leaf.q, leaf.rank)
        for leaf in report.leaves
        if leaf.is_factored
    }


def why_dense(path, params: Any = PARAMS, rank: Any = 8, **kwargs: Any):
    report = lp.describe(lp.scale_by_lorapre_adam(rank, **kwargs), params)
    return next(leaf.why_dense for leaf in report.leaves if leaf.path == path)


def test_default_takes_the_large_matrices_of_a_stack_too():
    assert factored() == {
        "embed/embedding": ((), 256, 128, 8),
        "layers/attention/q": ((4,), 128, 128, 8),
        "layers/attention/o": ((4,), 128, 128, 8),
        "layers/mlp": ((4,), 128, 384, 8),
        "head": ((), 128, 256, 8),
    }
    assert why_dense("layers/norm", rank=2) == "a bias or a scale, by its name"
    assert why_dense("w", {"w": struct(127, 512)}) == "a side is below 128"


def test_a_rank_that_does_not_pay_leaves_the_leaf_dense():
    assert factored({"w": struct(128, 128)}, rank=63) == {"w": ((), 128, 128, 63)}
    assert factored({"w": struct(128, 128)}, rank=64) == {}
    reason = why_dense("w", {"w": struct(128, 128)}, 64, matrices=lp.MatrixAxes())
    assert reason == "rank 64 does not pay: r(p+q) >= pq"


def test_one_spec_speaks_for_every_leaf_that_has_its_axes():
    assert factored(matrices=lp.MatrixAxes(-2, -1), rank=2)["layers/norm"] == (
        (),
        4,
        128,
        2,
    )
    assert why_dense("bias", matrices=lp.MatrixAxes()) == "lacks the matrix axes"


@pytest.mark.parametrize("axes", [lp.MatrixAxes(), lp.MatrixAxes(0, (1, 2))])
def test_axes_alone_select_every_leaf_that_has_them(axes):
    params = {"w": struct(12, 8), "s": struct(3, 12, 8), "b": struct(8)}

    def described(matrices):
        return lp.describe(lp.scale_by_lorapre_adam(1, matrices=matrices), params)

    assert described(lp.select_matrices(axes=axes)) == described(axes)
    some = described(lp.select_matrices("^[ws]$", exclude="w", axes=axes))
    assert [leaf.path for leaf in some.leaves if leaf.is_factored] == ["s"]


def test_a_tree_may_have_none_where_the_parameters_have_none():
    matrices = {"w": lp.MatrixAxes(), "b": None}
    tx = lp.scale_by_lorapre_adam(1, matrices=matrices)
    (leaf,) = lp.describe(tx, {"w": struct(12, 8), "b": None}).leaves
    assert leaf.is_factored


def test_one_spec_passes_over_leaves_on_which_its_axes_coincide():
    params = {"w": struct(12, 8), "b": struct(8)}
    assert set(factored(params, 2, matrices=lp.MatrixAxes(0, -1))) == {"w"}


def test_two_spellings_of_the_same_axes_agree():
    axes = {"w": lp.MatrixAxes(0, (1,)), "^w$": lp.MatrixAxes(-2, -1)}
    selection = lp.select_matrices(axes=axes)
    assert set(factored({"w": struct(12, 8)}, 2, matrices=selection)) == {"w"}


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def test_a_parameter_called_value_keeps_its_name():
    params = {"attention": Attention(*[struct(12, 8)] * 3)}
    selection = lp.select_matrices("attention/value")
    assert set(factored(params, 2, matrices=selection)) == {"attention/value"}
    mask: Any = {"attention": Attention(query=False, key=False, value=True)}
    tx = optax.masked(lp.scale_by_lorapre_adam(2, matrices=selection), mask)
    leaves = {leaf.path: leaf for leaf in lp.describe(tx, params).leaves}
    assert leaves["attention/value"].is_factored
    assert leaves["attention/query"].nbytes == 0


@pytest.mark.parametrize("as_tree", [False, True])
def test_so_it_does_where_its_siblings_are_none(as_tree):
    params = {"attention": Attention(None, None, struct(12, 8))}
    matrices: Any = lp.select_matrices("attention/value")
    if as_tree:
        matrices = {"attention": Attention(None, None, lp.MatrixAxes())}
    assert set(factored(params, 2, matrices=matrices)) == {"attention/value"}


AXES = {
    "attention/q": lp.MatrixAxes(rows=1, columns=(2, 3)),
    "attention/o": lp.MatrixAxes(rows=(1, 2), columns=3),
    "mlp": lp.MatrixAxes(-2, -1),
}
LAYERS = {
    "layers/attention/q": ((4,), 128, 128, 8),
    "layers/attention/o": ((4,), 128, 128, 8),
    "layers/mlp": ((4,), 128, 384, 8),
}


def test_selection_by_path():
    selection = lp.select_matrices("layers/(attention|mlp)", axes=AXES)
    assert factored(matrices=selection) == LAYERS
    assert why_dense("head", matrices=selection) == "not included"
    without_mlp = lp.select_matrices(exclude=["mlp", "^head$", "embed"], axes=AXES)
    small = {"min_dim_size_to_factor": 1, "rank": 2}
    assert set(factored(matrices=without_mlp, **small)) == {
        "layers/attention/q",
        "layers/attention/o",
        "layers/norm",
    }
    assert why_dense("layers/mlp", matrices=without_mlp) == "excluded"


def test_tree_of_axes_and_prefixes():
    muon_axes = optax.contrib.MuonDimensionNumbers([1], [2, 3])
    tree = {
        "embed": None,
        "layers": {
            "attention": {"q": muon_axes, "o": AXES["attention/o"]},
            "mlp": AXES["mlp"],
            "norm": None,
        },
        "head": None,
        "bias": None,
    }
    assert factored(matrices=tree) == LAYERS
    assert why_dense("head", matrices=tree) == "not selected"
    prefix = {"layers": None, "embed": lp.MatrixAxes(), "head": None, "bias": None}
    assert set(factored(matrices=prefix)) == {"embed/embedding"}


def test_selections_are_frozen_values():
    selection = lp.select_matrices("w", axes={"w": lp.MatrixAxes(0, 1)})
    same = lp.select_matrices(["w"], axes={"w": lp.MatrixAxes(0, 1)})
    assert selection == same
    assert hash(selection) == hash(same)
    assert not callable(selection)
    with pytest.raises(AttributeError):
        setattr(selection, "include", ())  # noqa: B010 (pyright knows it is frozen)


def test_patterns_are_compiled_once(monkeypatch):
    """Also many of them, since `re` itself forgets all but the last 512."""
    params: Any = {f"w{i}": struct(12, 8) for i in range(3)}
    patterns = [f"^{name}$" for name in params]
    matrices = lp.select_matrices(
        patterns, exclude="^w2$", axes=dict.fromkeys(patterns, lp.MatrixAxes())
    )
    moments = dict.fromkeys(patterns, lp.LowRank())
    lp.lorapre_muon(0.1, 2, moment=moments)

    def forbidden(pattern, *_):
        raise AssertionError(f"{pattern!r} is looked up again")

    state: Any
    with monkeypatch.context() as patched:
        for name in ("compile", "search", "match", "fullmatch", "sub"):
            patched.setattr(re, name, forbidden)
        tx = lp.lorapre_muon(0.1, 2, moment=moments, matrices=matrices)
        state = tx.init(params)
    leaves = state.inner_states["muon"].inner_state[0].plan.leaves
    assert [leaf.path for leaf in leaves] == ["w0", "w1"]


def test_rank_as_a_fraction_of_the_smaller_side():
    ranks = factored(rank=Fraction(1, 8), matrices=lp.MatrixAxes(1, 2), params={
        "a": struct(4, 128, 384), "b": struct(2, 64, 32)
    })  # fmt: skip
    assert {path: r for path, (*_, r) in ranks.items()} == {"a": 16, "b": 4}
    tiny = {"w": struct(5, 40)}
    assert factored(tiny, Fraction(1, 100), matrices=lp.MatrixAxes()) == {
        "w": ((), 5, 40, 1)
    }


def test_moment_without_factors_needs_no_rank_that_pays():
    dense_and_rank_one = {"first_moment": lp.Dense(), "second_moment": lp.RankOne()}
    small = {"w": struct(8, 8)}
    assert factored(small, 8, matrices=lp.MatrixAxes(), **dense_and_rank_one)
    both = {"first_moment": lp.Dense(), "second_moment": lp.Dense()}
    assert why_dense("head", **both) == "Dense() moments"


def test_views_are_the_documented_reshape():
    """Axes are fused in the given order, and the transform sees (batch, p, q)."""
    leaf = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype("float32")
    fused = lp.lorapre_ema(0.5, 2, matrices=lp.MatrixAxes(rows=(3, 1), columns=0))
    plain = lp.lorapre_ema(0.5, 2, matrices=lp.MatrixAxes(rows=1, columns=2))
    matrix = leaf.transpose(2, 3, 1, 0).reshape(2, 20, 3)
    state: Any
    u, state = fused.update(jnp.asarray(leaf), fused.init(jnp.asarray(leaf)))
    v, _ = plain.update(jnp.asarray(matrix), plain.init(jnp.asarray(matrix)))
    assert isinstance(state.plan.leaves[0], FactoredLeaf)
    np.testing.assert_array_equal(
        np.asarray(u).transpose(2, 3, 1, 0).reshape(2, 20, 3), np.asarray(v)
    )
