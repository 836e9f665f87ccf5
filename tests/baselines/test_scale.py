"""SCALE against its equations, and which columns it normalizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import P, Q, defaults, normal, run, size_in_bytes

from benchmarks.baselines.scale import scale_by_scale, scale_by_scale_last_layer


def oracle(grads, b1=0.0, eps=1e-8):
    """Algorithm 1, for a kernel of P inputs and Q outputs."""
    m, directions = np.zeros((P, Q)), []
    for g in grads:
        m = b1 * m + (1 - b1) * g
        columns = [m[:, j] / max(np.sqrt(np.mean(m[:, j] ** 2)), eps) for j in range(Q)]
        directions.append(np.stack(columns, axis=1))
    return np.stack(directions)


def test_follows_its_equations():
    grads = normal()
    directions, _ = run(scale_by_scale(), grads)
    np.testing.assert_allclose(directions, oracle(grads), rtol=1e-5)


def test_the_last_layer_follows_its_equations():
    grads = normal()
    directions, _ = run(scale_by_scale_last_layer(), grads)
    np.testing.assert_allclose(directions, oracle(grads, b1=0.9), rtol=1e-4, atol=1e-5)


def test_the_last_layer_without_momentum_is_like_all_others():
    grads = normal()
    last, _ = run(scale_by_scale_last_layer(b1=0.0), grads)
    other, _ = run(scale_by_scale(), grads)
    np.testing.assert_array_equal(last, other)


def test_one_input_moves_by_its_sign():
    grads = normal(shape=(1, Q))
    directions, _ = run(scale_by_scale(), grads)
    signs, _ = run(optax.scale_by_sign(), grads)
    np.testing.assert_allclose(directions, signs, rtol=1e-6)


def test_the_gradient_of_an_output_has_no_size():
    """In `y = x @ kernel`, the loss of one output reaches one column of the kernel."""
    x = np.random.default_rng(1).normal(size=(5, P))
    kernel = normal()[0]

    def direction(sizes):
        def loss(kernel):
            return jnp.sum(jnp.sin(x @ kernel) * sizes)

        return run(scale_by_scale(), jax.grad(loss)(kernel)[None])[0]

    sizes = np.linspace(0.1, 10, Q)
    np.testing.assert_allclose(direction(sizes), direction(np.ones(Q)), rtol=1e-4)


def test_zero_gradients_do_not_move():
    for tx in (scale_by_scale(), scale_by_scale_last_layer()):
        directions, _ = run(tx, normal() * 0)
        assert (directions == 0).all()


def test_size_of_the_state():
    assert not jax.tree.leaves(scale_by_scale().init(jnp.zeros((P, Q))))
    state = jax.eval_shape(scale_by_scale_last_layer().init, jnp.zeros((P, Q)))
    assert size_in_bytes(state) == 4 * P * Q + 4  # The last one is optax's count.


def test_defaults_are_the_published_ones():
    assert defaults(scale_by_scale) == {"eps": 1e-8}
    assert defaults(scale_by_scale_last_layer) == {"b1": 0.9, "eps": 1e-8}


def test_leaves_must_be_matrices():
    for tx in (scale_by_scale(), scale_by_scale_last_layer()):
        with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
            tx.init({"bias": jnp.zeros(4)})
