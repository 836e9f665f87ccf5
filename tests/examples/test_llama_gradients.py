"""The loss and its gradient: in parts, with a mask, and with a z-loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_MODEL

from examples.llama import layout
from examples.llama.config import Config
from examples.llama.data.rows import Batch
from examples.llama.gradients import make_loss_and_grads
from examples.llama.pure import PureLlama

VOCABULARY = 40


@pytest.fixture(scope="module")
def batch():
    """Returns eight rows, of whose targets none to all count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (8, 17), np.int32)
    mask = np.arange(16) < np.asarray([16, 3, 0, 16, 9, 1, 16, 5])[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32))


@pytest.fixture(scope="module")
def params():
    return jax.jit(PureLlama(TINY_MODEL, VOCABULARY).init)(jax.random.key(0))


def test_it_is_the_mean_over_the_targets_that_count(batch, params):
    model = PureLlama(TINY_MODEL, VOCABULARY)
    loss, _ = jax.jit(make_loss_and_grads(model))(params, batch)
    logits = np.asarray(model.apply(params, batch.inputs), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    counts = batch.mask == 1
    np.testing.assert_allclose(loss, losses[counts].mean(), rtol=1e-5)

    def objective(params):
        log_z = jax.nn.logsumexp(model.apply(params, batch.inputs), axis=-1)
        total = loss_of(params) + 0.1 * jnp.mean(jnp.square(log_z)[counts])
        return total

    def loss_of(params):
        found = model.losses(params, batch.inputs, batch.targets)
        return jnp.mean(found[counts])

    plain, grads = jax.jit(make_loss_and_grads(model, z_loss=0.1))(params, batch)
    np.testing.assert_allclose(plain, loss, rtol=1e-6)  # What is reported has none.
    expected = jax.jit(jax.grad(objective))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grads,
        expected,
    )


@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=4"])
def test_in_parts_it_is_the_same(micro_batch_size, mesh, batch, params):
    """The parts have 19, 16, 10 and 21 targets that count."""
    mesh = layout.make_mesh(mesh, jax.devices()) if mesh else None
    model = PureLlama(TINY_MODEL, VOCABULARY, mesh)
    if mesh:
        batch = jax.device_put(batch, layout.by_row(mesh, micro_batch_size))
    at_once = jax.jit(make_loss_and_grads(model))(params, batch)
    in_parts = jax.jit(make_loss_and_grads(model, micro_batch_size))
    assert "scan" in str(in_parts.trace(params, batch).jaxpr)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        in_parts(params, batch),
        at_once,
    )


def test_parts_of_bfloat16_gradients_are_added_in_float32(batch, params):
    config = dataclasses.replace(TINY_MODEL, param_dtype="bfloat16")
    model = PureLlama(config, VOCABULARY)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(
        lambda x: x.dtype, jax.eval_shape(model.init, jax.random.key(0))
    )
    in_parts = jax.jit(make_loss_and_grads(model, 1))
    _, grads = in_parts(params, batch)
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"bfloat16"}
    (scan,) = [e for e in in_parts.trace(params, batch).jaxpr.eqns if "scan" in str(e)]
    carried = scan.params["jaxpr"].out_avals[: scan.params["num_carry"]]
    assert {x.dtype.name for x in carried} == {"float32"}


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match=r"`micro_batch_size` \(3\) must divide"):
        Config(micro_batch_size=3)
