"""Conversion of states to other ranks, methods and transforms, against NumPy's SVD."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import assert_close, assert_same, random_tree, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp
from lorapre_jax._moments import representations
from lorapre_jax._moments.factors import FactorPair, RowColumn

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"bias": (8,), "heads": (16, 8, 4), "stack": (3, 16, 32), "w": (16, 32)}
MATRICES = lp.select_matrices(
    axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^(stack|w)$": lp.MatrixAxes()}
)
PAPER = lp.AlgorithmOne()
BETAS: Any = {"b1": 0.9, "b2": 0.95}
STEPS = 5


def adam(rank=4, **fields: Any):
    return lp.scale_by_lorapre_adam(rank, **BETAS, matrices=MATRICES, **fields)


def gradients(shapes=SHAPES):
    """Returns gradients of rank two plus noise, so that truncation has an effect."""
    for seed in range(STEPS):
        trees = [random_tree(shapes, 3 * seed + i) for i in range(2)]
        yield jax.tree.map(
            lambda x, y: x[..., :1] * x[..., :1, :] + 0.1 * y if x.ndim > 1 else x,
            *trees,
        )


def trained(tx) -> Any:
    params = random_tree(SHAPES)
    return params, run(tx, params, gradients(), jit=True)[1]


def matrices(name, x):
    """`(batch, 16, 32)` float64."""
    return np.asarray(x, np.float64).reshape(-1, 16, 32)


def product(pair, p=16, q=32):
    """Returns the product, `(batch, p, q)`; sides may have several axes."""
    rank = pair.left.shape[-1]
    left, right = float64(pair.left, p, rank), float64(pair.right, q, rank)
    return left @ right.swapaxes(-1, -2)


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def rank_one(root):
    """Returns the root of Adafactor's estimate of the square of `root`."""
    v = root**2
    row, column = v.mean(-1, keepdims=True), v.mean(-2, keepdims=True)
    return np.sqrt(row * column / row.mean(-2, keepdims=True))


@pytest.mark.parametrize("rank", [2, 7])
def test_another_rank_is_the_best_one(rank):
    params, state = trained(adam(second_moment=lp.LowRank()))
    new = lp.convert_state(state, adam(rank, second_moment=lp.LowRank()), params)
    assert new.count == STEPS
    assert_close(new.mu["bias"], state.mu["bias"])
    for moment in ("mu_factors", "nu_factors"):
        for name, pair in getattr(new, moment).items():
            before = product(getattr(state, moment)[name])
            assert pair.left.shape[-1] == rank
            expected = truncated(before, rank)
            np.testing.assert_allclose(product(pair), expected, atol=1e-5)


def test_nothing_of_the_size_of_a_matrix_is_formed_to_change_a_rank():
    pair = FactorPair(jnp.ones((100, 6)), jnp.ones((90, 6)))
    for fn in (
        lambda x: representations.as_factors(x, 4),
        representations.as_row_column,
    ):
        assert "100,90" not in str(jax.make_jaxpr(fn)(pair))
    assert "100,90" in str(jax.make_jaxpr(representations.as_dense)(pair))
    row_column = RowColumn(jnp.ones(100), jnp.ones(90))
    as_factors = jax.make_jaxpr(lambda x: representations.as_factors(x, 4))(row_column)
    assert "100,90" not in str(as_factors)


@pytest.mark.parametrize(("fall", "excess"), [(0.0, 0.011), (0.5, 4e-3), (1.0, 2e-3)])
def test_a_dense_moment_becomes_nearly_the_best_factors(fall, excess):
    """Its error is near the least one, for singular values k^-fall and for noise."""
    x = np.random.default_rng(0).standard_normal((256, 688))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = np.arange(1.0, 257) ** -fall if fall else s
    x = (u * s) @ vt
    pair = representations.as_factors(jnp.asarray(x, jnp.float32), 32)
    least = np.sqrt(np.sum(s[32:] ** 2))
    assert 0.9999 < np.linalg.norm(x - product(pair, 256, 688)[0]) / least < 1 + excess


def averages(tx):
    """Returns optax's bias-corrected first moments, and roots of the second."""
    params, state = trained(tx)
    mu, nu = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
    names = ("heads", "stack", "w")
    m = {k: matrices(k, mu[k]) / (1 - 0.9**STEPS) for k in names}
    root = {k: np.sqrt(matrices(k, nu[k]) / (1 - 0.95**STEPS)) for k in names}
    return params, state, m, root


def test_from_optax_adamw_with_its_schedule():
    def alias(make, **kwargs):
        rate = optax.linear_schedule(1e-2, 0.0, 100)
        return optax.chain(optax.clip_by_global_norm(1e9), make(rate, **kwargs))

    params, state, m, root = averages(alias(optax.adamw, **BETAS, weight_decay=0.1))
    new_tx = alias(
        lp.lorapre_adamw, rank=4, matrices=MATRICES, weight_decay=0.1, **BETAS
    )
    new: Any = lp.convert_state(state, new_tx, params, **BETAS)
    assert jax.tree.structure(new) == jax.tree.structure(new_tx.init(params))
    ours, schedule = new[1][0], new[1][-1]
    assert ours.count == schedule.count == STEPS
    assert_close(ours.nu["bias"], state[1][0].nu["bias"])
    for name, pair in ours.mu_factors.items():
        best = truncated(m[name], 4)
        error = np.linalg.norm(product(pair).reshape(best.shape) - m[name])
        assert error < 1.01 * np.linalg.norm(best - m[name])
        assert_rotated(ours.nu_factors[name], pair, m[name], root[name])
    step_with_donation(new_tx, new, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))  # Still there.


def float64(x, *shape):
    return np.asarray(x, np.float64).reshape(-1, *shape)


def squares(row, left, direction):
    """Returns mean squares of rows of the residual and of directions."""
    return row**2 + np.einsum("nik,nk->ni", left**2, direction**2)


def assert_rotated(found, pair, m, root):
    """Asserts what `RotatedRankOne()` should hold if entries are uncorrelated."""
    rank = pair.left.shape[-1]
    left, right = float64(pair.left, 16, rank), float64(pair.right, 32, rank)
    row = np.sqrt((root**2).mean(-1))
    direction = np.sqrt(np.einsum("nik,ni->nk", left**2, row**2))
    part = np.linalg.norm(np.einsum("nik,nij->nkj", left, m), axis=-1)
    part = part / np.linalg.norm(m, axis=(-2, -1))[:, None]
    energy = np.linalg.norm(row, axis=-1)[:, None]
    for least in (np.sqrt((right**2).mean(-2)), part * energy):
        direction = np.maximum(direction, least)
    rest = np.maximum(row**2 - squares(0.0, left, direction), 0) + 0.05**2 * row**2
    column = np.sqrt((root**2).mean(-2))
    expected = {"row": np.sqrt(rest), "column": column, "direction": direction}
    for field, value in expected.items():
        actual = float64(getattr(found, field), value.shape[-1])
        np.testing.assert_allclose(actual, value, rtol=1e-3, err_msg=field)


def test_rotated_moments_to_rank_one_and_to_other_ranks():
    params, state = trained(adam())
    plain = lp.convert_state(state, adam(second_moment=lp.RankOne()), params)
    assert_same(lp.convert_state(state, adam(), params), state)
    for rank in (2, 4, 7):
        new = lp.convert_state(state, adam(rank), params)
        for name, nu in new.nu_factors.items():
            old, left = (
                state.nu_factors[name],
                float64(state.mu_factors[name].left, 16, 4),
            )
            row, direction = float64(old.row, 16), float64(old.direction, 4)
            whole = squares(row, left, direction)
            found = float64(plain.nu_factors[name].row, 16)
            np.testing.assert_allclose(found**2, whole, rtol=1e-4)
            np.testing.assert_array_equal(nu.column, old.column)
            after = float64(new.mu_factors[name].left, 16, rank)
            inside = np.einsum("nil,nik->nlk", left, after)
            outside = after - left @ inside
            expected = np.einsum("nlk,nl->nk", inside**2, direction**2)
            expected += np.einsum("nik,ni->nk", outside**2, row**2)
            expected[:, 4:] = whole.mean(-1, keepdims=True)  # Not found yet.
            found = float64(nu.direction, rank)
            np.testing.assert_allclose(found**2, expected, rtol=1e-3)


def step_with_donation(tx, state, params):
    """Takes the next step as a training loop does, with a donated state."""
    updates, after = jax.jit(tx.update, donate_argnums=1)(params, state, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves((updates, after)))


METHODS = {
    "default": {},
    "both factored": {"second_moment": lp.LowRank()},
    "paper": {"first_moment": PAPER, "second_moment": PAPER},
    "dense": {"first_moment": lp.Dense(), "second_moment": lp.Dense()},
}


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_to_optax_adam_as_the_update_reads_it(fields):
    """The next update for a zero gradient is the old average, decayed once."""
    params, state = trained(adam(**fields))
    theirs = optax.scale_by_adam(**BETAS)
    new: Any = lp.convert_state(state, theirs, params, **BETAS)
    assert jax.tree.structure(new) == jax.tree.structure(theirs.init(params))
    for name in ("heads", "stack", "w"):
        m = matrices(name, new.mu[name]) / (1 - 0.9**STEPS)
        root = np.sqrt(matrices(name, new.nu[name]) / (1 - 0.95**STEPS))
        assert_reads(state, name, m, root, fields)


def assert_reads(state, name, m, root, fields):
    if fields.get("first_moment") == lp.Dense():
        np.testing.assert_array_equal(
            m, matrices(name, state.mu[name]) / (1 - 0.9**STEPS)
        )
        return
    is_paper = fields.get("first_moment") == PAPER
    held = product(state.mu_factors[name]).reshape(m.shape)
    corrected = held / (1 - 0.9**STEPS) if is_paper else held
    np.testing.assert_allclose(m, corrected, rtol=1e-4, atol=1e-5)
    nu = state.nu_factors[name]
    if hasattr(nu, "left"):
        held = np.abs(product(nu).reshape(root.shape))
        corrected = held / (1 - 0.95 ** (STEPS / 2)) if is_paper else held
        np.testing.assert_allclose(root, corrected, rtol=1e-4, atol=1e-5)


def test_there_and_back_again():
    """A moment that factors hold exactly is the same after both conversions."""
    params, state = trained(adam(second_moment=lp.LowRank()))
    dense = lp.convert_state(state, optax.scale_by_adam(**BETAS), params, **BETAS)
    again = lp.convert_state(dense, adam(second_moment=lp.LowRank()), params, **BETAS)
    for name, pair in again.mu_factors.items():
        expected = product(state.mu_factors[name])
        np.testing.assert_allclose(product(pair), expected, rtol=1e-3, atol=1e-4)


def test_the_paper_can_go_on_from_a_lower_rank():
    """New directions are random, since the paper's step never leaves zeros."""
    paper = {"first_moment": PAPER, "second_moment": PAPER}
    params, state = trained(adam(2, **paper))
    new = lp.convert_state(state, adam(4, **paper), params)
    np.testing.assert_allclose(
        product(new.mu_factors["w"]), product(state.mu_factors["w"]), atol=1e-6
    )
    update = jax.jit(adam(4, **paper).update)
    for _ in range(60):
        _, new = update(random_tree(SHAPES, 9), new)
    assert np.linalg.matrix_rank(product(new.mu_factors["w"]), 1e-3) == 4


def test_a_fresh_state_becomes_a_fresh_state():
    params = random_tree(SHAPES)
    state = optax.scale_by_adam(**BETAS).init(params)
    new = lp.convert_state(state, adam(), params, **BETAS)
    assert new.count == 0
    for pair in new.mu_factors.values():
        assert not product(pair).any()


def test_arguments_in_optax_state_are_those_of_the_new_transform():
    params = {"w": random_tree(SHAPES)["w"]}
    muon: Any = functools.partial(
        optax.contrib.scale_by_muon,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()},
    )
    _, state = run(muon(), params, [params])
    coefficients = ((2.0, -1.5, 0.5),) * 5
    new = muon(ns_coeffs=coefficients)
    converted = lp.convert_state(state, new, params, b1=0.95)
    np.testing.assert_allclose(converted.ns_coeffs, coefficients)
    assert_close(converted.mu, state.mu)


FROZEN = {name: name != "w" for name in SHAPES}


@pytest.mark.parametrize(
    "tx",
    [
        adam(),
        adam(first_moment=PAPER, second_moment=PAPER),
        optax.adam(1e-3),
        optax.scale_by_amsgrad(),
    ],
)
def test_leaves_that_were_frozen_start_fresh(tx):
    params = random_tree(SHAPES)
    masked: Any = optax.masked(tx, FROZEN)
    state = jax.tree.map(lambda x: x + 1, masked.init(params))
    with pytest.warns(UserWarning, match=r"no moments of 'w'\. The new ones start"):
        new = lp.convert_state(state, tx, params)
    fresh = tx.init(params)
    assert jax.tree.structure(new) == jax.tree.structure(fresh)

    def of_w(path):
        return any(getattr(key, "key", None) == "w" for key in path)

    before = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(state.inner_state)
    }
    for (path, x), start in zip(
        jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(fresh), strict=True
    ):
        expected = start if of_w(path) else before[jax.tree_util.keystr(path)]
        np.testing.assert_array_equal(x, expected)
    # Freezing them again is nothing to report.
    assert_same(lp.convert_state(new, masked, params), state)


def test_leaves_that_have_another_name():
    params = random_tree(SHAPES)
    state = adam().init(params)
    renamed = {("u" if name == "w" else name): x for name, x in params.items()}
    matrices = lp.select_matrices(
        axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^(stack|u)$": lp.MatrixAxes()}
    )
    tx = lp.scale_by_lorapre_adam(4, **BETAS, matrices=matrices)
    with pytest.warns(
        UserWarning, match=r"no moments of 'u'\. .* moments of 'w' match no leaf"
    ):
        lp.convert_state(state, tx, renamed)
    with pytest.raises(ValueError, match="Leaf 'x': the old state has no moment of it"):
        lp.convert_state(state, optax.scale_by_adam(), {"x": params["w"]})


def test_amsgrad_keeps_its_maximum():
    params, state = trained(optax.scale_by_amsgrad(**BETAS))
    new = lp.convert_state(state, optax.scale_by_amsgrad(**BETAS), params)
    assert_close(new, state)


def test_muon_and_average():
    params = {k: v for k, v in random_tree(SHAPES).items() if k != "bias"}
    shapes = {k: v.shape for k, v in params.items()}
    ema = lp.lorapre_ema(0.9, 4, matrices=MATRICES)
    _, state = run(ema, params, gradients(shapes))
    muon = lp.scale_by_lorapre_muon(3, matrices=MATRICES)
    new = lp.convert_state(state, muon, params)
    for name, pair in new.momentum_factors.items():
        expected = truncated(product(state.ema_factors[name]), 3)
        np.testing.assert_allclose(product(pair), expected, atol=1e-5)


def test_a_branch_without_leaves_and_a_leaf_without_elements():
    muon = lp.lorapre_muon(1e-3, 2, matrices=lp.MatrixAxes(0, 1))
    params = random_tree({"w": (16, 32)})
    step_with_donation(muon, lp.convert_state(muon.init(params), muon, params), params)
    params = random_tree({"w": (16, 32), "empty": (0, 4)})
    ours = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes())
    theirs = optax.scale_by_adam()
    state = lp.convert_state(ours.init(params), theirs, params, **BETAS)
    again = lp.convert_state(state, ours, params, **BETAS)
    step_with_donation(theirs, state, params)
    step_with_donation(ours, again, params)


def test_from_factors_of_transposed_matrices_to_dense():
    """A dense leaf has a view too, but that of the factors is used."""
    params = random_tree({"w": (16, 32)})
    ours = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes(0, 1))
    _, state = run(ours, params, gradients({"w": (16, 32)}))
    new_tx = lp.scale_by_lorapre_adam(
        2,
        first_moment=lp.Dense(),
        second_moment=lp.Dense(),
        matrices=lp.MatrixAxes(1, 0),
    )
    new = lp.convert_state(state, new_tx, params, **BETAS)
    expected = product(state.mu_factors["w"])[0] * (1 - 0.9**STEPS)
    np.testing.assert_allclose(new.mu["w"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind, kind))
    specs = {"heads": P("x", "y"), "stack": P(None, "x", "y"), "w": P("x", "y")}
    places = {n: NamedSharding(mesh, specs.get(n, P())) for n in SHAPES}
    params, state = trained(optax.scale_by_adam(**BETAS))
    expected = lp.convert_state(state, adam(), params, **BETAS)
    params = jax.device_put(params, places)
    state = jax.device_put(
        state, lp.state_sharding(optax.scale_by_adam(**BETAS), params)
    )
    new = lp.convert_state(state, adam(), params, **BETAS)
    rate = optax.linear_schedule(1e-2, 0.0, 100)
    theirs = optax.adamw(rate, **BETAS)
    for tx in (theirs, lp.lorapre_adamw(rate, 4, **BETAS, matrices=MATRICES)):
        started: Any = theirs.init(params)
        started = (state, *started[1:])
        converted = lp.convert_state(started, tx, params, **BETAS)
        step_with_donation(tx, converted, params)
    for x, place in zip(
        jax.tree.leaves(new),
        jax.tree.leaves(lp.state_sharding(adam(), params)),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    for name, pair in new.mu_factors.items():
        np.testing.assert_allclose(
            product(pair), product(expected.mu_factors[name]), atol=1e-4
        )


def test_what_cannot_be_converted():
    params, state = trained(optax.scale_by_adam(**BETAS))
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda state: lp.convert_state(state, adam(), params))(state)
    with pytest.raises(ValueError, match=r"'heads': .* its first moment .*Pass .* b1="):
        lp.convert_state(state, adam(), params)
    dense = adam(first_moment=lp.Dense(), second_moment=lp.RankOne())
    with pytest.raises(ValueError, match=r"'heads': .* its second moment .* b2="):
        lp.convert_state(state, dense, params, b1=0.9)
    ema = lp.lorapre_ema(0.9, 4, matrices=MATRICES).init(params)
    with pytest.raises(ValueError, match="'bias': the old state has no second"):
        lp.convert_state(ema, adam(), params)
    with pytest.raises(ValueError, match="Leaf 'bias': the old state has two first"):
        lp.convert_state((state, state), adam(), params)
    with pytest.raises(ValueError, match=r"'mini_step' of shape .* has none there"):
        lp.convert_state(
            state, optax.MultiSteps(adam(), 2).gradient_transformation(), params
        )
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"'bias': the count .* has shape \(2,\)"):
        lp.convert_state(several, adam(), params)
    with pytest.raises(ValueError, match="different numbers of steps"):
        lp.convert_state(
            (state, optax.ema(0.9).init({"x": params["w"]})), adam(), params
        )
    other = jax.tree.map(lambda x: x.T if x.shape == (16, 32) else x, state)
    with pytest.raises(ValueError, match=r"'w': the old moment has shape \(32, 16\)"):
        lp.convert_state(other, adam(), params, **BETAS)
    elsewhere = jax.device_put(state, jax.devices()[1])
    with pytest.raises(ValueError, match="'heads': its moment is not on the devices"):
        lp.convert_state(elsewhere, adam(), params, **BETAS)
    transposed = lp.select_matrices(
        axes={"^heads$": lp.MatrixAxes((0, 1), 2), "^(stack|w)$": lp.MatrixAxes()}
    )
    other = lp.scale_by_lorapre_adam(2, **BETAS, matrices=transposed)
    with pytest.raises(ValueError, match="'heads': the old factors are of matrices"):
        lp.convert_state(trained(adam())[1], other, params)
