"""Programs of the TPU's own compiler, without a TPU (`make test-tpu`)."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from benchmarks import tpu_compile
from benchmarks._collectives import collectives
from examples.llama import layout

pytest.importorskip("libtpu", reason="libtpu is an extra: make test-tpu")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    tpu_compile.prepare()
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


def test_a_training_step():
    cell = tpu_compile.Cell(
        "9m", mesh="fsdp=2,tensor=2", rank=8, batch_size=64, seq_len=64
    )
    row = tpu_compile.measured(cell)
    assert row["arguments"] >= row["parameters"] + row["optimizer state"]
    assert row["peak"] >= row["arguments"] + row["gradients"]
    assert row["outputs not aliased"] < 0.001 * row["arguments"]  # metrics
    # Parameters are fetched and gradients summed. Where every device computes all rows,
    # what is sent is 15 times the parameters.
    whole = 4 * row["parameters"]
    assert 0 < sum(row["collectives"].values()) < 2 * whole


def test_no_more_than_a_factor_crosses():
    """At most a factor is gathered, and never a part of a gradient."""
    rank = 8
    mesh = layout.make_mesh("fsdp=2,tensor=2", tpu_compile.devices_of("v5e:2x2"))
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    shape = jax.ShapeDtypeStruct((4, 512, 1024), jnp.float32, sharding=place)
    params = {"stack": shape}
    tx = lp.lorapre_adamw(1e-3, rank, matrices=lp.MatrixAxes())
    places = lp.state_sharding(tx, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        places,
    )
    update = jax.jit(
        tx.update, donate_argnums=(0, 1), out_shardings=({"stack": place}, places)
    )
    program = update.lower(params, state, params).compile().as_text() or ""
    found = collectives(program)
    whole, part = 4 * rank * 1024, 4 * rank * 1024 // 2  # of the larger factor
    for each in found:
        bound = whole if each.kind == "all-gather" else part
        assert math.prod(each.shape) <= bound, each
    assert found
