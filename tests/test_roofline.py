"""The formulas of the roofline against what the transforms trace to."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _roofline, update_time

SHAPES = {
    "small": (((2, 24, 40), (2, 40, 24), (1, 32, 32)), 8),
    "larger": (((2, 128, 352), (1, 352, 128), (1, 96, 400)), 24),
}
TRANSFORMS = ("optax adam", "optax muon", "lorapre_adam, default", "lorapre_muon")


def products(jaxpr) -> int:
    """Returns the multiplications and additions of all products, in all rounds."""
    return sum(_times(eqn) * _of(eqn) for eqn in jaxpr.eqns)


def _times(eqn) -> int:
    assert eqn.primitive.name != "while", "a loop that does not say how often it runs"
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _of(eqn) -> int:
    if eqn.primitive.name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"][0]
        lengths = [eqn.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod(lengths) * math.prod(eqn.outvars[0].aval.shape)
    inner = list(map(products, _programs(eqn)))
    return max(inner) if eqn.primitive.name == "cond" else sum(inner)


def _programs(eqn):
    leaves = jax.tree.leaves(eqn.params, is_leaf=_is_program)
    return [getattr(x, "jaxpr", x) for x in leaves if _is_program(x)]


def _is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.fixture(params=SHAPES)
def sizes(request):
    shapes, rank = SHAPES[request.param]
    params = {str(x): jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes}
    return params, rank


def traced(name, params, rank):
    tx = update_time.transforms(params, rank)[name]
    state = jax.eval_shape(tx.init, params)
    return tx, state, jax.make_jaxpr(tx.update)(params, state).jaxpr


def test_the_walk_counts_rounds_of_loops_and_one_branch():
    x = jnp.ones((4, 8, 8))

    def fn(x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jax.jit(jnp.matmul)(x, x), x)
        return jax.lax.cond(x[0, 0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    assert products(jax.make_jaxpr(fn)(x).jaxpr) == (3 + 1) * 4 * 2 * 8**3


@pytest.mark.parametrize("name", TRANSFORMS)
def test_operations_are_those_of_the_products(name, sizes):
    params, rank = sizes
    found = _roofline.work(name, params, rank)
    _, _, jaxpr = traced(name, params, rank)
    assert found is not None
    # Written twice in Muon; see below.
    again = {"lorapre_muon": sum(2 * x.size * rank for x in params.values())}
    assert found.operations + again.get(name, 0) == products(jaxpr)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_bytes_are_those_of_gradient_update_and_state(name, sizes):
    params, rank = sizes
    found = _roofline.work(name, params, rank)
    _, state, _ = traced(name, params, rank)

    def size(tree):  # Without counts and coefficients, which have no axis of layers.
        return sum(4 * x.size for x in jax.tree.leaves(tree) if x.ndim > 1)

    assert found is not None
    assert found.bytes == 2 * size(params) + 2 * size(state)


def test_the_compiler_computes_once_what_is_written_twice():
    """And not at all what would lead to a Gram matrix after the last step: two more."""
    params = {"w": jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)}
    tx, state, jaxpr = traced("lorapre_muon", params, 8)
    program = jax.jit(tx.update).lower(params, state).compile().as_text() or ""
    assert len(re.findall(r" dot\(", program)) == _written(jaxpr) - 1 - 2


def _written(jaxpr) -> int:
    """Returns how many products are written, those in a loop once."""
    inner = [x for eqn in jaxpr.eqns for x in _programs(eqn)]
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(map(_written, inner))


def test_rates_are_measured():
    rates = _roofline.measured_rates(side=16, copied=2**10)
    assert all(rate > 0 for rate in rates)


def test_a_row_of_each_rank_and_shares_in_the_median_time(monkeypatch):
    monkeypatch.setattr(update_time, "measure", lambda *_: (1.0, 0.5, 0.7))
    rates = _roofline.Rates(operations=1e12, bytes=1e9)
    rows = update_time.measured("tiny", (16, 8), repeats=1, rates=rates)
    by_name = {(row["transform"], row["rank"]): row for row in rows}
    assert len(by_name) == len(rows) == 2 + 2 * 4  # optax's once
    params = update_time.matrices(*update_time.SIZES["tiny"][:3])
    for rank in (16, 8):
        row = by_name["lorapre_muon", rank]
        work = _roofline.work("lorapre_muon", params, rank)
        assert work is not None
        assert row["of matmul rate"] == pytest.approx(work.operations / 0.5 / 1e12)
        assert row["of copy rate"] == pytest.approx(work.bytes / 0.5 / 1e9)
        assert by_name["lorapre_adam, paper", rank]["of matmul rate"] is None
    assert by_name["optax adam", None]["of matmul rate"] == 0


def test_a_rank_at_which_a_matrix_stays_dense():
    rates = _roofline.Rates(1.0, 1.0)
    with pytest.raises(ValueError, match="At rank 100 a matrix of size tiny stays"):
        update_time.measured("tiny", (8, 100), repeats=1, rates=rates)
