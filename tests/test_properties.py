"""Properties that hold for every gradient, drawn by hypothesis for a few shapes."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import lorapre_jax as lp
from benchmarks import spike
from lorapre_jax._leaves.plan import FactoredLeaf
from lorapre_jax._numerics.averages import unbiased_decay
from lorapre_jax._numerics.orthonormal import orthonormal_columns

pytestmark = pytest.mark.usefixtures("quick_compilation")

hypothesis.settings.register_profile(
    "lorapre_jax", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("lorapre_jax")

SHAPES = [(3, 12, 8), (3, 8, 12)]
RANK = 3
PAPER = lp.AlgorithmOne()
BARE = {"min_dim_size_to_factor": 1, "matrices": lp.MatrixAxes()}
TRANSFORMS = {
    "adam": lp.scale_by_lorapre_adam(RANK, **BARE),
    "adam_both_factored": lp.scale_by_lorapre_adam(
        RANK, second_moment=lp.LowRank(), **BARE
    ),
    "adam_paper": lp.scale_by_lorapre_adam(
        RANK, first_moment=PAPER, second_moment=PAPER, **BARE
    ),
    "muon": lp.scale_by_lorapre_muon(RANK, **BARE),
    "ema": lp.lorapre_ema(0.9, RANK, **BARE),
}

seeds = st.integers(0, 2**31 - 1)
shapes = st.sampled_from(SHAPES)
names = st.sampled_from(sorted(TRANSFORMS))


@functools.cache
def updater(name):
    """Compiles one step per transform, since hypothesis draws values only."""
    return jax.jit(TRANSFORMS[name].update)


@functools.cache
def compiled(method, moment, shape, rank, dtype="float32"):
    """Returns the zero state and the compiled step of a method on one matrix."""
    state = method.init((), *shape, rank, jnp.dtype(dtype), 0)
    step = jax.jit(getattr(method, moment))
    return state, lambda state, g, decay, t: step(
        state, jnp.asarray(g, dtype), jnp.asarray(decay, dtype), jnp.asarray(t), 0
    )


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


def normal(seed, shape, steps=4):
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


def run(name, grads):
    grads = jnp.asarray(grads)
    state: Any = TRANSFORMS[name].init(grads[0])
    assert all(isinstance(leaf, FactoredLeaf) for leaf in state.plan.leaves)
    updates = []
    for g in grads:
        update, state = updater(name)(g, state)
        updates.append(np.asarray(update))
    return np.stack(updates), state


@hypothesis.given(names, shapes, seeds, st.integers(0, 2))
def test_slices_are_independent(name, shape, seed, which):
    grads, other = normal(seed, shape), normal(seed + 1, shape)
    mixed = grads.copy()
    mixed[:, which] = other[:, which]
    base, changed = run(name, grads)[0], run(name, mixed)[0]
    kept = [i for i in range(3) if i != which]
    np.testing.assert_array_equal(changed[:, kept], base[:, kept])
    assert (changed[:, which] != base[:, which]).any()


def special(kind, seed, shape):
    grads = normal(seed, shape)
    if kind == "zero":
        return np.zeros_like(grads)
    if kind == "zero_first":
        return np.concatenate([np.zeros_like(grads[:2]), grads])
    if kind == "rank_one":
        return grads[..., :1] * grads[..., :1, :]
    if kind == "duplicate_rows":
        return np.repeat(grads[..., :1, :], shape[-2], axis=-2)
    if kind == "one_entry":
        return (
            grads * (np.arange(shape[-1]) == 1) * (np.arange(shape[-2]) == 1)[:, None]
        )
    return grads * np.float32(kind)


KINDS = ["zero", "zero_first", "rank_one", "duplicate_rows", "one_entry", 1e-12, 1e12]


@hypothesis.given(names, shapes, seeds, st.sampled_from(KINDS))
@hypothesis.settings(max_examples=80)
def test_degenerate_gradients(name, shape, seed, kind):
    """Nothing moves before the first gradient, then every matrix at every step, in
    the structure of its gradients."""
    grads = special(kind, seed, shape)
    updates, state = run(name, grads)
    assert np.isfinite(updates).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    begun = np.logical_or.accumulate(grads.any(axis=(2, 3)))
    np.testing.assert_array_equal(updates.any(axis=(2, 3)), begun)
    if kind == "duplicate_rows":
        assert (updates == updates[:, :, :1]).all()
    if kind == "one_entry" and name != "adam_paper":  # Its factors start at random.
        assert not updates[grads == 0].any()
    if kind == "rank_one":
        sizes = np.linalg.svd(updates[0], compute_uv=False)
        assert (sizes[:, 1] < 1e-4 * sizes[:, 0]).all()


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


@functools.cache
def default_without_eps(name):
    tx = {
        "adam": lp.scale_by_lorapre_adam(RANK, eps=0.0, **BARE),
        "adam_both_factored": lp.scale_by_lorapre_adam(
            RANK, eps=0.0, second_moment=lp.LowRank(), **BARE
        ),
        "muon": lp.scale_by_lorapre_muon(RANK, eps=0.0, **BARE),
    }[name]
    return tx, jax.jit(tx.update)


@hypothesis.given(
    st.sampled_from(["adam", "adam_both_factored", "muon"]),
    shapes,
    seeds,
    st.floats(-12, 12),
)
def test_the_scale_of_the_gradients_does_not_matter(name, shape, seed, exponent):
    tx, update = default_without_eps(name)
    grads = jnp.asarray(normal(seed, shape))
    scaled = grads * np.float32(10.0**exponent)
    state, state_scaled = tx.init(grads[0]), tx.init(grads[0])
    for g, g_scaled in zip(grads, scaled, strict=True):
        u, state = update(g, state)
        u_scaled, state_scaled = update(g_scaled, state_scaled)
        error = np.linalg.norm(u_scaled - u) / np.linalg.norm(u)
        assert error < 1e-4


@hypothesis.given(names, shapes, seeds, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_non_finite_gradient_shows_in_its_own_slice_alone(name, shape, seed, bad):
    grads = normal(seed, shape)
    spoilt = grads.copy()
    spoilt[2, 1, 2, 3] = bad
    base, broken = run(name, grads)[0], run(name, spoilt)[0]
    np.testing.assert_array_equal(broken[:, [0, 2]], base[:, [0, 2]])
    np.testing.assert_array_equal(broken[:2, 1], base[:2, 1])
    assert not np.isfinite(broken[2, 1]).all()


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


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
@hypothesis.given(seed=seeds, decay=st.floats(0.0, 0.99))
@hypothesis.settings(max_examples=10)
def test_full_rank_regression_is_the_dense_average(shape, seed, decay):
    """The default's first moment, with r = min(p, q) and factors of full rank."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        state, step = compiled(
            lp.LowRank(), "first_moment", shape, min(shape), "float64"
        )
        mu = np.zeros(shape)
        for t in range(1, 7):
            g = rng.normal(size=shape)
            m, state = step(state, g, decay, t)
            mu = decay * mu + (1 - decay) * g
            np.testing.assert_allclose(m, mu / (1 - decay**t), rtol=1e-7, atol=1e-8)


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


@pytest.mark.parametrize(("method", "rank"), [(lp.LowRank(), 3), (lp.RankOne(), 1)])
@hypothesis.given(seed=seeds, decay=st.sampled_from([0.9, 0.95, 0.999]))
@hypothesis.settings(max_examples=10)
def test_constant_magnitude_gives_its_square_at_every_step(method, rank, seed, decay):
    rng = np.random.default_rng(seed)
    magnitude = rng.uniform(0.1, 1, (12, rank)) @ rng.uniform(0.1, 1, (rank, 8))
    state, step = compiled(method, "second_moment", (12, 8), 3)
    for t in range(1, 40):
        g = magnitude * rng.choice([-1, 1], magnitude.shape)
        root, state = step(state, g, decay, t)
        np.testing.assert_allclose(root, magnitude, rtol=2e-3)


@hypothesis.given(seed=seeds, decay=st.sampled_from([0.9, 0.95, 0.999]))
@hypothesis.settings(max_examples=10)
def test_so_it_does_in_the_basis_of_the_left_factor(seed, decay):
    """Parts have magnitudes of rank one, to which the floor adds 2 % at most."""
    rng = np.random.default_rng(seed)
    along, rest = (
        rng.uniform(0.5, 1, (n, 1)) * rng.uniform(0.1, 1, 8) for n in (3, 12)
    )
    rest *= along[:1] / rest[:1]  # One shape for the columns of both.
    method = lp.RotatedRankOne()
    state = method.init((), 12, 8, 3, jnp.float32, 0)
    step = jax.jit(method.rotated_moment)
    for t in range(1, 40):
        corrected = unbiased_decay(jnp.float32(decay), jnp.int32(t))
        parts = (
            jnp.asarray(x * rng.choice([-1, 1], x.shape), "float32")
            for x in (rest, along.T, rest)
        )
        roots, state = step(state, *parts, corrected)
        for root, magnitude in zip(roots, (along.T, rest), strict=True):
            np.testing.assert_allclose(root, magnitude, rtol=2e-2)


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


@hypothesis.given(seeds, st.floats(0, 6), st.sampled_from([1, 4, 8]))
def test_bases_are_orthonormal_or_empty(seed, decades, rank):
    """For columns of norms over six decades, some of them repeated."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 8)) * np.logspace(0, -decades, 8)
    x[:, rank:] = x[:, :1]  # Rank-deficient below 8.
    basis = np.asarray(orthonormal_columns(jnp.asarray(x, "float32")))
    values = np.linalg.svd(basis, compute_uv=False)
    assert values.max() < 1 + 1e-5
    kept = rank if decades <= 3 else 1  # Smaller ones drown in the rounding of others.
    np.testing.assert_allclose(values[:kept], 1, atol=1e-5)


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
