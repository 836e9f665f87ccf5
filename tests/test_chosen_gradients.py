"""Properties of updates, shown by gradients that were chosen for them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from property_cases import (
    PAPER,
    RANK,
    SHAPES,
    TRANSFORMS,
    compiled,
    normal,
    run,
    updater,
)

import lorapre_jax as lp
from benchmarks import spike
from lorapre_jax._numerics.averages import unbiased_decay
from lorapre_jax._numerics.orthonormal import orthonormal_columns

pytestmark = pytest.mark.usefixtures("quick_compilation")


def in_a_span_of_columns(steps=300, p=12, q=8, seed=0):
    """Returns gradients whose columns stay in one space of RANK dimensions."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((steps, RANK, q))
    return (rng.standard_normal((p, RANK)) @ rows).astype(np.float32)


def updates_of(tx, grads):
    def step(state, g):
        update, state = tx.update({"w": g}, state, {"w": g})
        return state, update["w"]

    scan = jax.jit(lambda grads: jax.lax.scan(step, tx.init({"w": grads[0]}), grads))
    return np.asarray(scan(grads)[1])


@pytest.mark.parametrize("seed", range(3))
def test_muon_is_full_muon_where_columns_of_gradients_span_little(seed):
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    # optax's leaves the shape's scale to its alias; it is 1 for q < p.
    full = optax.contrib.scale_by_muon(weight_dimension_numbers={"w": axes})
    ours = lp.scale_by_lorapre_muon(RANK, min_dim_size_to_factor=1)
    grads = in_a_span_of_columns(seed=seed)
    # Not a trace of the residual, which is the gradient's rounding.
    np.testing.assert_allclose(
        updates_of(ours, grads), updates_of(full, grads), atol=2e-3
    )


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_what_lasts_is_held_whichever_side_it_is_on(side):
    """Everything else about the gradients changes at every step."""
    grads = in_a_span_of_columns()
    noise = np.random.default_rng(1).standard_normal(grads.shape).astype(np.float32)
    grads = grads + 1e-3 * noise
    grads = grads if side == "columns" else grads.transpose(0, 2, 1)
    expected = updates_of(optax.ema(0.9), grads)
    averages = updates_of(lp.lorapre_ema(0.9, RANK, min_dim_size_to_factor=1), grads)
    error = np.linalg.norm(averages - expected) / np.linalg.norm(expected)
    assert error < 0.01


# Up to where the state keeps them. Beyond, sums over a side of a matrix overflow, or
# the squares of Algorithm 1; or the reciprocal of the largest entry underflows.
LARGEST = dict.fromkeys(TRANSFORMS, 1e37) | {"adam_paper": 1e18}

TOO_LARGE = dict.fromkeys(TRANSFORMS, 3e38) | {"adam_paper": 1e20}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_near_the_end_of_float32(name):
    """As documented, they are lost or overflow; clipping before the transform helps."""

    def are_kept(size, limit=np.inf):
        # Of one sign, so that nothing cancels in a sum.
        grads = np.full((6, *SHAPES[0]), size, np.float32)
        grads[1::2] = 0
        outcome = run(name, np.clip(grads, -limit, limit))
        leaves = jax.tree.leaves(outcome)
        return all(np.isfinite(leaf).all() and np.any(leaf) for leaf in leaves)

    assert are_kept(LARGEST[name])
    assert not are_kept(TOO_LARGE[name])
    assert are_kept(TOO_LARGE[name], limit=1e18)


def test_so_it_is_of_adam():
    """The same is true of optax's Adam, whose squares overflow sooner."""
    tx: Any = optax.scale_by_adam()
    _, state = tx.update(jnp.full(3, 1e20), tx.init(jnp.zeros(3)))
    assert not np.isfinite(state.nu).any()


def test_what_follows_a_spike():
    """As the docstring of Algorithm 1 says; `benchmarks/spike.py` has the figures."""
    grads = spike.gradients(30)
    assert spike.largest_update(spike.OPTIMIZERS["Algorithm 1"], grads) > 20
    assert spike.largest_update(spike.OPTIMIZERS["default"], grads) < 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_apply_if_finite_keeps_the_state_and_other_leaves(name):
    tx = optax.apply_if_finite(TRANSFORMS[name], 3)
    grads = {"a": jnp.asarray(normal(0, SHAPES[0])[0]), "b": jnp.ones((6, 9))}
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads))
    spoilt = {**grads, "a": grads["a"].at[0, 0, 0].set(jnp.nan)}
    updates, after = update(spoilt, state)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    inner_updates, _ = updater(name)(spoilt, state.inner_state)
    assert np.isfinite(inner_updates["b"]).all()
    assert not np.isfinite(inner_updates["a"][0]).all()


def test_steady_directions_get_steps_of_one_size():
    """Singular values of the gradient differ tenfold, those of the update do not."""
    left = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 3)))[0]
    right = scipy.linalg.hadamard(16)[1:4]
    grads = np.broadcast_to(left * [1, 0.3, 0.1] @ right, (200, 16, 16))

    def spectrum(**fields):
        tx = lp.scale_by_lorapre_adam(4, min_dim_size_to_factor=1, **fields)
        update = updates_of(tx, grads.astype(np.float32))[-1]
        return np.linalg.svd(update, compute_uv=False)

    size = np.sqrt(16)  # Entries of plus and minus one, along each direction.
    np.testing.assert_allclose(spectrum()[:3], size, rtol=1e-2)
    assert spectrum()[3] < 1e-3
    by_entry = spectrum(second_moment=lp.RankOne())
    assert by_entry[0] > 5 * by_entry[2]


@pytest.mark.parametrize("directions", [1, 4])
def test_few_directions_get_a_small_update(directions):
    """Its root mean square is sqrt(k / p), since each direction has its own scale."""
    p, q = 64, 16
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((p, directions)))[0]
    right = np.sign(rng.standard_normal((directions, q)))
    grads = np.broadcast_to(left @ right, (20, p, q)).astype(np.float32)
    tx = lp.scale_by_lorapre_adam(6, min_dim_size_to_factor=1)
    assert lp.describe(tx, jnp.asarray(grads[0])).leaves[0].is_factored
    update = updates_of(tx, grads)[-1]
    size = np.sqrt(np.mean(np.square(update)))
    np.testing.assert_allclose(size, np.sqrt(directions / p), rtol=0.05)


def test_rounding_is_no_direction():
    """Divided by its own size, rounding of low-rank gradients would become large."""
    grads = in_a_span_of_columns()
    tx = lp.scale_by_lorapre_adam(RANK + 1, min_dim_size_to_factor=1)
    assert lp.describe(tx, jnp.asarray(grads[0])).leaves[0].is_factored
    updates = updates_of(tx, grads)
    span = np.linalg.qr(grads[0])[0][:, :RANK]
    outside = updates - span @ (span.T @ updates)
    assert np.abs(updates).max() > 0.5
    assert np.abs(outside).max() < 1e-3


@pytest.mark.parametrize(
    "second",
    [lp.RotatedRankOne(), lp.RankOne(), lp.Dense(), lp.LowRank()],
)
@pytest.mark.parametrize("b2", [0.95, 0.999])
@pytest.mark.parametrize("moves", [True, False])
def test_no_update_of_adam_exceeds_its_bound(moves, b2, second):
    """Not with outliers either, whether they are one entry or another each time."""
    rng = np.random.default_rng(0)
    grads = 1e-3 * rng.standard_normal((50, 32, 32), np.float32)
    rows, columns = rng.integers(32, size=(2, 50)) if moves else ([2], [7])
    grads[np.arange(50), rows, columns] += 10 * rng.standard_normal(50)
    grads[:, :, 5] = 0
    tx = lp.scale_by_lorapre_adam(
        RANK, 0.9, b2, second_moment=second, min_dim_size_to_factor=1
    )
    update, state = jax.jit(tx.update), tx.init(jnp.asarray(grads[0]))
    of_one, held = 1 / np.sqrt(1 - b2), 1 / ((1 - 0.9) * np.sqrt(1 - b2))
    bound = held
    if second == lp.RotatedRankOne():
        bound = np.sqrt(RANK) * held + of_one
    for g in grads:
        u, state = update(jnp.asarray(g), state)
        # It would be 500 or more.
        assert jnp.abs(u).max() < 1.00001 * bound
    if second == lp.RotatedRankOne():  # Nor are the other entries blown up.
        assert jnp.sqrt(jnp.mean(u**2)) < of_one


def test_nothing_leaks_in_float32():
    """Bases that are slightly too short would shrink the average at every step."""
    rng, decay = np.random.default_rng(0), 0.99
    method = lp.LowRank(residual_gain=0.0)
    state, step = compiled(method, "first_moment", (32, 32), 32)
    mu = np.zeros((32, 32))
    for t in range(1, 301):
        g = rng.normal(size=mu.shape)
        m, state = step(state, g, decay, t)
        mu = decay * mu + (1 - decay) * g
    average = mu / (1 - decay**300)
    error = np.linalg.norm(np.asarray(m) - average) / np.linalg.norm(average)
    assert error < 1e-4


@pytest.mark.parametrize("method", [lp.LowRank(), PAPER])
def test_directions_that_died_come_back(method):
    """After gradients with one entry or none, factors find a target.

    The zeros are exact, so that no rounding error has a part in these directions.
    """
    rng = np.random.default_rng(0)
    first = np.zeros((12, 8))
    first[3, 5] = 1.0
    target = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 8))
    state, step = compiled(method, "first_moment", (12, 8), 3)
    stream = [np.zeros((12, 8))] * 2 + [first] * 5 + [target] * 150
    for t, g in enumerate(stream, 1):
        _, state = step(state, g, 0.9, t)
    held = np.asarray(state.product)
    assert np.linalg.norm(held - target) < 1e-2 * np.linalg.norm(target)


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("i", "j"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_weights_of_a_gradient_add_up(gain, i, j, in_parts):
    """They add up to one in the factors, and to the gain for the residual.

    Steady gradients fill the factors, of rank one. A small impulse in one of their two
    spaces, or in both, is taken up; an impulse in neither is passed on at once.
    """
    base, impulse = np.zeros((2, 12, 8))
    base[0, 0], impulse[i, j] = 10, 1e-2
    method = lp.LowRank(residual_gain=gain)
    state, step = compiled(method, "first_moment", (12, 8), 1)
    split = jax.jit(method.split_moment)
    passed = 0.0
    for t in range(1, 200):
        g = base + impulse * (t == 100)
        if in_parts:  # As Adam and Muon see it.
            decay = unbiased_decay(jnp.float32(0.9), jnp.int32(t))
            state, _, rest = split(state, jnp.asarray(g, "float32"), decay, 0)
            m = state.product + gain * rest
        else:
            m, state = step(state, g, 0.9, t)
        passed += float(m[i, j]) - base[i, j]
    expected = gain if i == j == 1 else 1.0
    assert passed == pytest.approx(expected * 1e-2, abs=3e-4)


@pytest.mark.parametrize("decades", [2, 4])
@pytest.mark.parametrize("shape", [(256, 64), (64, 64)])
def test_a_basis_of_ill_conditioned_columns_is_that_of_gram_and_schmidt(shape, decades):
    """Any two columns may be nearly parallel: the order of what is left decides."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=shape))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))
    x = ((u * np.logspace(0, -decades, shape[1])) @ v.T).astype("float32")
    basis = np.asarray(orthonormal_columns(jnp.asarray(x)))
    np.testing.assert_allclose(basis.T @ basis, np.eye(shape[1]), atol=1e-5)
    exact, triangle = np.linalg.qr(x.astype(float))
    exact *= np.sign(np.diag(triangle))
    # Rounding of x alone turns the last columns by eps times its condition.
    np.testing.assert_allclose(basis, exact, atol=3e-7 * 10**decades)
