"""Properties that hold for every gradient, drawn by hypothesis for a few shapes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from property_cases import BARE, RANK, SHAPES, TRANSFORMS, compiled, normal, run

import lorapre_jax as lp
from lorapre_jax._numerics.averages import unbiased_decay
from lorapre_jax._numerics.orthonormal import orthonormal_columns

pytestmark = pytest.mark.usefixtures("quick_compilation")

hypothesis.settings.register_profile(
    "lorapre_jax", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("lorapre_jax")

seeds = st.integers(0, 2**31 - 1)

shapes = st.sampled_from(SHAPES)

names = st.sampled_from(sorted(TRANSFORMS))


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
