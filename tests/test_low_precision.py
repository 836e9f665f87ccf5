"""Updates where matmuls are in bfloat16 by default, as on TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorapre_jax as lp
from lorapre_jax._leaves.plan import FactoredLeaf
from lorapre_jax._moments.row_column import FLOOR
from tests.low_precision import as_on_tpu

P, Q, RANK, STEPS = 96, 160, 16, 20


def test_the_emulation_rounds_what_a_tpu_rounds():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(P, Q)), jnp.float32)

    def default(x):
        return jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ x), x @ x.T @ x @ x.T)

    def full(x):
        with jax.default_matmul_precision("highest"):
            return default(x)

    square = x @ x.T
    exact = jax.jit(full)(square)
    np.testing.assert_allclose(as_on_tpu(full)(square), exact, rtol=1e-5, atol=1e-6)
    assert jnp.abs(as_on_tpu(default)(square) - exact).max() > 1e-3


def gradients(noise):
    """Of rank 8 with singular values from 10 to 0.5, and noise."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (P, Q))
    for _ in range(STEPS):
        g = u * np.geomspace(10, 0.5, 8) @ v.T + noise * rng.normal(size=(P, Q))
        yield jnp.asarray(g, jnp.float32)


@pytest.mark.parametrize("b1", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("noise", [0, 0.01, 0.1])
def test_rounding_of_the_residual_stays_below_the_floor(noise, b1):
    # A difference of products 1 / (1 - b1) times as large would not.
    method = lp.LowRank()

    def split(state, g, decay):
        return method.split_moment(state, g, decay, 0)

    step, rounded_step = jax.jit(split), as_on_tpu(split)
    exact = rounded = method.init((), P, Q, RANK, jnp.float32, 0)
    for t, g in enumerate(gradients(noise), 1):
        decay = jnp.float32(b1 * (1 - b1 ** (t - 1)) / (1 - b1**t))
        exact, _, wanted = step(exact, g, decay)
        rounded, _, found = rounded_step(rounded, g, decay)
        error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(g)
        assert error < FLOOR / 2
    assert error > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("make", [lp.scale_by_lorapre_adam, lp.scale_by_lorapre_muon])
def test_updates_are_nearly_those_of_full_precision(make):
    tx = make(RANK, matrices=lp.MatrixAxes(-2, -1))
    step, rounded_step = jax.jit(tx.update), as_on_tpu(tx.update)
    grads = [{"w": jnp.stack([g, 2 * g])} for g in gradients(0.1)]
    exact = rounded = tx.init(grads[0])
    assert isinstance(exact.plan.leaves[0], FactoredLeaf)
    errors = []
    for g in grads:
        wanted, exact = step(g, exact)
        found, rounded = rounded_step(g, rounded)
        error = jnp.linalg.norm(found["w"] - wanted["w"])
        errors.append(error / jnp.linalg.norm(wanted["w"]))
    assert max(errors) < 0.1
