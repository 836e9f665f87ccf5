"""Flora against its equations in float64, and what the paper says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import P, Q, normal, run

from benchmarks.baselines import _matrices
from benchmarks.baselines.flora import flora_momentum, scale_by_flora

RANK, INTERVAL = 3, 3
FLORA = scale_by_flora(RANK, interval=INTERVAL, clipping_threshold=0.5, seed=5)
MOMENTUM = flora_momentum(RANK, interval=INTERVAL, seed=5)


def drawn(seed, draw):
    """The projection of a lone leaf."""
    key = optax.tree.split_key_like(jax.random.key(seed), jnp.zeros(()))
    return np.asarray(_matrices.random_projection(key, draw, (RANK, P)), np.float64)


def momentum_oracle(grads, b1=0.9, seed=5):
    """Algorithm 2."""
    m, directions = np.zeros((RANK, Q)), []
    a = drawn(seed, 0)
    for t, g in enumerate(grads):
        if t > 0 and t % INTERVAL == 0:
            a, old = drawn(seed, t // INTERVAL), a
            m = a @ old.T @ m
        m = b1 * m + (1 - b1) * a @ g
        directions.append(a.T @ m)
    return np.stack(directions)


def adafactor_oracle(grads):
    """The gradients over the roots of their factored second moments.

    Shazeer and Stern (2018), algorithms 2 and 4, the decay `1 - t^-0.8` of section 7.2.
    """
    row, column, quotients = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        decay = 1 - t**-0.8
        row = decay * row + (1 - decay) * np.sum(g**2, axis=1)
        column = decay * column + (1 - decay) * np.sum(g**2, axis=0)
        quotients.append(g / np.sqrt(np.outer(row, column) / np.sum(row)))
    return np.stack(quotients)


@pytest.mark.parametrize("tall", [False, True])
def test_momentum_follows_its_equations(tall):
    grads = normal()
    expected = momentum_oracle(grads)
    if tall:
        grads, expected = (x.transpose(0, 2, 1) for x in (grads, expected))
    directions, _ = run(MOMENTUM, grads)
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tall", [False, True])
def test_follows_its_equations(tall):
    grads, threshold = normal(), 0.5
    expected = momentum_oracle(adafactor_oracle(grads))
    size = np.sqrt(np.mean(expected**2, axis=(1, 2), keepdims=True))
    assert any(size > threshold)
    assert any(size < threshold)
    expected /= np.maximum(size / threshold, 1)
    if tall:
        grads, expected = (x.transpose(0, 2, 1) for x in (grads, expected))
    directions, _ = run(FLORA, grads)
    np.testing.assert_allclose(directions, expected, rtol=1e-4, atol=1e-5)


def test_momentum_is_the_moving_average_on_average():
    """Also of what went through two transfers, for no single draw is exact."""
    grads = np.concatenate([normal(sizes=np.ones(1)), np.zeros((2, P, Q))])

    @jax.jit
    @jax.vmap
    def directions(seed):
        tx = flora_momentum(4, b1=0.5, interval=1, seed=seed)
        state, taken = tx.init(grads[0]), []
        for g in grads.astype(np.float32):
            direction, state = tx.update(g, state)
            taken.append(direction)
        return taken

    mean = np.mean(directions(np.arange(20_000)), axis=1)
    for t, average in enumerate(mean):
        expected = 0.5 ** (t + 1) * grads[0]
        error = np.linalg.norm(average - expected) / np.linalg.norm(expected)
        assert error < 0.05


def test_updates_leave_the_space_of_one_projection():
    """Within an interval they have the rank of the projection, over many full rank."""
    directions, _ = run(flora_momentum(1, interval=4), normal())
    ranks = [np.linalg.matrix_rank(directions[:t].sum(axis=0)) for t in (4, 8)]
    assert ranks == [1, 2]


def test_zero_gradients_give_zero():
    assert (run(FLORA, 0 * normal())[0] == 0).all()


@pytest.mark.parametrize("shape", [(P, Q), (Q, P)])
def test_size_of_the_state(shape):
    """Rows, columns and projected momentum; optax adds one number and a count."""
    state = FLORA.init(jnp.zeros(shape))
    sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sum(sizes) == RANK * Q + P + Q + 1 + 2


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        FLORA.init({"bias": jnp.zeros(4)})
