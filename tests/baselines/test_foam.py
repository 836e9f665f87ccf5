"""FOAM against its equations in float64, and where it must be Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trajectories import gradients, run, size_in_bytes

from benchmarks.baselines.foam import scale_by_foam

SHAPES = {"even": (8, 5), "ragged": (10, 6), "narrow": (3, 7)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
STEPS = 6


def oracle(grads, fold_squares, level=2, scale=0.25, b1=0.9, b2=0.999, eps=1e-8):
    """The directions for one kernel, by the paper's products with A and E.

    Matrices are (out, in), as in the paper, and the constants the published ones.
    """
    block, n = 2**level, grads.shape[1]
    blocks = -(-n // block)
    member = np.arange(blocks * block)[:, None] // block == np.arange(blocks)
    fold, unfold = member / block, member.T.astype(float)
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        g = np.pad(g.T, ((0, 0), (0, blocks * block - n)))
        m = b1 * m + (1 - b1) * g @ fold
        v = b2 * v + (1 - b2) * (g**2 @ fold if fold_squares else (g @ fold) ** 2)
        r = g - g @ fold @ unfold
        d = scale * (m @ unfold + r) / (np.sqrt(v @ unfold + r**2) + eps)
        yield (d * np.sqrt(1 - b2**t) / (1 - b1**t)).T[:n]


@pytest.mark.parametrize("fold_squares", [False, True])
def test_follows_its_equations(fold_squares):
    grads = gradients(SHAPES, STEPS)
    directions, _ = run(scale_by_foam(fold_squares=fold_squares), grads)
    for name, direction in directions.items():
        expected = list(oracle(grads[name], fold_squares))
        np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)


def test_takes_other_constants():
    grads = gradients({"kernel": (10, 6)}, STEPS)
    constants = 1, 0.5, 0.8, 0.9, 1e-2
    directions, _ = run(scale_by_foam(*constants), grads)
    expected = list(oracle(grads["kernel"], False, *constants))
    np.testing.assert_allclose(directions["kernel"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fold_squares", [False, True])
def test_is_adam_in_blocks_of_one(fold_squares):
    grads = gradients(SHAPES, STEPS)
    tx = scale_by_foam(0, 1.0, fold_squares=fold_squares)
    directions, _ = run(tx, grads)
    adam, _ = run(optax.scale_by_adam(), grads)
    for name in SHAPES:
        np.testing.assert_allclose(directions[name], adam[name], rtol=1e-4, atol=1e-5)


def test_is_adam_if_the_entries_along_the_input_axis_agree():
    """Those of a column of a kernel (in, out), block by block, leave no residual."""
    grads = gradients({"kernel": (2, 5)}, STEPS)["kernel"]
    directions, _ = run(scale_by_foam(), np.repeat(grads, 4, axis=1))
    adam, _ = run(optax.scale_by_adam(), np.repeat(grads, 4, axis=1))
    np.testing.assert_allclose(directions, 0.25 * adam, rtol=1e-4, atol=1e-5)


def test_the_residual_is_not_kept():
    """A gradient whose means vanish moves the kernel, and leaves no mark."""
    grads = gradients({"kernel": (8, 5)}, STEPS)["kernel"]
    means = grads.reshape(STEPS, 2, 4, 5).mean(axis=2)
    directions, states = run(scale_by_foam(), grads - np.repeat(means, 4, axis=1))
    assert np.abs(directions).min() > 0.01
    for moment in states.moments:
        np.testing.assert_allclose(moment, 0, atol=1e-6)


def test_zero_gradients_leave_no_mark():
    directions, _ = run(scale_by_foam(), np.zeros((2, 8, 5)))
    assert (directions == 0).all()


def test_keeps_two_moments_of_the_block_means():
    state = jax.eval_shape(scale_by_foam().init, PARAMS)
    assert size_in_bytes(state) == 4 + 2 * 4 * (2 * 5 + 3 * 6 + 1 * 7)


def test_leaves_must_be_matrices():
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(4,\)"):
        scale_by_foam().init({"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)})
