"""The numbers of `diagnostics`, against their definitions in float64 NumPy."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import MATRICES, SHAPES, random_tree, run
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECOND = {"second_moment": lp.LowRank()}
RANDOM_START: dict[str, Any] = {
    "first_moment": lp.AlgorithmOne(),
    "second_moment": lp.RankOne(),
}
diagnose = lp.diagnostics  # Op by op: equal shapes are compiled once.


def adam(**overrides: Any):
    return lp.scale_by_lorapre_adam(**{"rank": 3, "matrices": MATRICES, **overrides})


def gradients(seed: int, shapes=SHAPES):
    return random_tree(shapes, seed)


def filled(tx, like=SHAPES) -> Any:
    """Returns a state of `tx` with random factors, the same for equal shapes."""

    def fill(node):
        if not hasattr(node, "left"):
            return node
        shapes = {name: x.shape for name, x in node._asdict().items()}
        random = random_tree(shapes, 1)
        return node._replace(**{k: random[k].astype(node.left.dtype) for k in shapes})

    state = tx.init(gradients(0, like))
    return jax.tree.map(fill, state, is_leaf=lambda node: hasattr(node, "left"))


def with_factors(tx, like, left, right):
    """Returns a state of `tx` for one leaf, with these factors of the first moment."""
    state = tx.init({"w": like})
    factors = {"w": state.mu_factors["w"]._replace(left=left, right=right)}
    return state._replace(mu_factors=factors)


def to_matrices(name, leaf):
    """`(batch, p, q)`, float64."""
    x = np.asarray(leaf, np.float64)
    return x.reshape(12, 8)[None] if name == "heads" else x.reshape(-1, 12, 8)


def projector(x):
    """Returns the projector on the columns of x."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-6 * s.max()] if s.any() else u[:, :0]
    return u @ u.T


def expected(left, right, g):
    """Returns captured share, effective rank and condition of one matrix."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    outside = (np.eye(len(g)) - projector(left)) @ g
    outside = outside @ (np.eye(g.shape[1]) - projector(right))
    s = np.linalg.svd(left @ right.T, compute_uv=False)[: left.shape[1]]
    energy = s**2 / np.sum(s**2)
    return (
        1 - np.sum(outside**2) / np.sum(g**2),
        np.exp(-np.sum(energy * np.log(energy))),
        s[0] / s[-1],
    )


def check(found, factors, grads, names=SHAPES, absolute=False):
    for name in names:
        pair, g = factors[name], to_matrices(name, grads[name])
        lefts, rights = (
            np.asarray(x).reshape(len(g), side, -1)
            for x, side in zip(pair, g.shape[1:], strict=True)
        )
        rows = zip(lefts, rights, np.abs(g) if absolute else g, strict=True)
        values = np.array([expected(*row) for row in rows]).T
        for field, value in zip(found[name]._fields, values, strict=True):
            actual = getattr(found[name], field)
            assert actual.dtype == jnp.float32
            assert actual.shape == pair.left.shape[:-2]
            np.testing.assert_allclose(
                actual.ravel(), value, rtol=2e-5, err_msg=f"{name} {field}"
            )


def test_the_definitions():
    """Checks stacked, fused and plain matrices, and both moments."""
    state, grads = filled(adam(**SECOND)), gradients(9)
    found = jax.jit(lp.diagnostics)(state, grads)
    assert set(found) == set(SHAPES)
    assert all(set(of_leaf) == {"mu", "nu"} for of_leaf in found.values())
    first = {name: of_leaf["mu"] for name, of_leaf in found.items()}
    second = {name: of_leaf["nu"] for name, of_leaf in found.items()}
    check(first, state.mu_factors, grads)
    check(second, state.nu_factors, grads, absolute=True)


def test_permuted_and_fused_axes():
    """A leaf `(columns, batch, rows, columns)` is seen as a batch of its matrices."""
    g = random_tree({"w": (4, 2, 12, 2)}, 5)["w"]
    axes = lp.MatrixAxes(rows=2, columns=(3, 0))
    left, right = (random_tree({"x": s}, 6)["x"] for s in ((2, 12, 3), (2, 2, 4, 3)))
    state = with_factors(adam(matrices=axes), g, left, right)
    found = diagnose(state, {"w": g})["w"]["mu"]
    matrices = jnp.transpose(g, (1, 2, 3, 0)).reshape(2, 12, 8)
    check({"w": found}, state.mu_factors, {"w": matrices}, ["w"])


def test_low_rank_and_unrelated_gradients():
    """`captured` is as documented for gradients in the factors and unrelated ones."""
    rng = np.random.default_rng(0)
    rank, p, q = 3, 60, 40
    columns, rows = rng.normal(size=(p, rank)), rng.normal(size=(rank, q))
    *seen, same_space = (
        {"w": jnp.asarray(columns @ rng.normal(size=(rank, rank)) @ rows, "f4")}
        for _ in range(4)
    )
    tx = adam(matrices=lp.MatrixAxes(), rank=rank)
    _, state = run(tx, same_space, seen, jit=True)
    left, right = state.mu_factors["w"]
    unrelated = jnp.asarray(rng.normal(size=(20, p, q)), "f4")

    def captured(g):
        return float(diagnose(state, {"w": g})["w"]["mu"].captured)

    for g in (
        same_space["w"],
        left @ unrelated[0][:rank],  # One side suffices.
        unrelated[0][:, :rank] @ right.T,
    ):
        np.testing.assert_allclose(captured(g), 1, rtol=1e-5)
    baseline = 1 - (1 - rank / p) * (1 - rank / q)
    mean = np.mean([captured(g) for g in unrelated])
    np.testing.assert_allclose(mean, baseline, rtol=0.1)


def test_known_singular_values():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (12, 8))
    g = gradients(2)["w"]
    tx = adam(matrices=None, min_dim_size_to_factor=1)

    def measure(*values, scale=1.0):
        left = jnp.asarray(u * np.array(values) * scale, jnp.float32)
        state = with_factors(tx, g, left, jnp.asarray(v * scale, jnp.float32))
        _, effective_rank, condition = diagnose(state, {"w": g})["w"]["mu"]
        return float(effective_rank), float(condition)

    np.testing.assert_allclose(measure(1, 1, 1), (3, 1), rtol=1e-5)
    np.testing.assert_allclose(measure(1, 1, 1e-4), (2, 1e4), rtol=1e-2)
    for last in (1e-9, 0):  # What rounding hides, and nothing.
        effective_rank, condition = measure(1, 1, last)
        np.testing.assert_allclose(effective_rank, 2, rtol=1e-5)
        assert condition == np.inf
    for scale in (1e-12, 1e12):
        np.testing.assert_allclose(measure(3, 2, 1, scale=scale)[1], 3, rtol=1e-5)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e30])
def test_any_scale_of_the_gradient(scale):
    state, grads = filled(adam(**SECOND)), gradients(9)
    found = diagnose(state, jax.tree.map(lambda g: scale * g, grads))
    if scale:
        reference = diagnose(state, grads)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, reference
        )
    else:
        assert all(not of["mu"].captured.any() for of in found.values())


def test_before_the_first_step():
    grads = gradients(1)
    for of_leaf in diagnose(adam(**SECOND).init(grads), grads).values():
        for found in of_leaf.values():
            assert not found.captured.any()
            assert not found.effective_rank.any()
            assert np.isposinf(found.condition).all()
    random = adam(**RANDOM_START)
    for of_leaf in diagnose(random.init(grads), grads).values():
        assert (of_leaf["mu"].captured > 0).all()
        assert not of_leaf["mu"].effective_rank.any()
        assert np.isposinf(of_leaf["mu"].condition).all()


LABELS = {"stack": "low", "heads": "low", "w": "low", "bias": "dense"}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "partition": lambda tx: optax.partition(
        {"low": tx, "dense": optax.adam(0.1)}, LABELS
    ),
    "masked": lambda tx: optax.masked(tx, {k: v == "low" for k, v in LABELS.items()}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_any_wrapper(wrapper):
    shapes = SHAPES | {"bias": (8,)}
    plain, wrapped = (filled(tx, shapes) for tx in (adam(), WRAPPERS[wrapper](adam())))
    grads = gradients(9, shapes)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4)  # noqa: E731
    jax.tree.map(close, diagnose(wrapped, grads), diagnose(plain, grads))


def test_hyperparameters_and_other_transforms():
    factory = optax.inject_hyperparams(lp.lorapre_ema, static_args=("rank",))
    state = filled(factory(decay=0.9, rank=3, matrices=MATRICES))
    assert {*diagnose(state, gradients(9))["w"]} == {"ema"}
    state = filled(lp.lorapre_muon(0.1, 3, matrices=MATRICES))
    assert {*diagnose(state, gradients(9))["stack"]} == {"momentum"}


def test_abstract_mapped_and_in_half_precision():
    state, grads = filled(adam(factor_dtype="bfloat16")), gradients(9)
    abstract = jax.eval_shape(lp.diagnostics, state, grads)
    assert abstract["stack"]["mu"].captured.shape == (3,)
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    with jax.numpy_dtype_promotion("strict"):
        found = lp.diagnostics(state, half)
    check({k: v["mu"] for k, v in found.items()}, state.mu_factors, half)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda g: g.astype(jnp.float64), grads)
        assert diagnose(state, double)["w"]["mu"].captured.dtype == jnp.float32
    twice = jax.tree.map(lambda *x: jnp.stack(x), *[(state, half)] * 2)
    mapped = jax.eval_shape(jax.vmap(lp.diagnostics), *twice)
    assert mapped["stack"]["mu"].captured.shape == (2, 3)


def test_no_batched_lapack_call():
    """Several batched calls in one program may hang, for which a test cannot wait."""
    state, grads = filled(adam()), gradients(9)
    text = jax.jit(lp.diagnostics).lower(state, grads).as_text()
    operands = re.findall(r"@lapack_\w+\(.*: \(tensor<(\w+)>\)", text)
    assert set(operands) == {"3x3xf32"}


def test_of_an_nnx_optimizer():
    """The state and the gradients are boxed."""
    model = nnx.Linear(12, 8, use_bias=False, rngs=nnx.Rngs(0))
    tx = adam(**RANDOM_START, matrices=lp.MatrixAxes())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model.kernel[...] ** 2))(model)
    found = diagnose(optimizer.opt_state, grads)
    pure = diagnose(nnx.as_pure(optimizer.opt_state), nnx.as_pure(grads))
    assert set(found) == set(pure) == {"kernel"}
    assert found["kernel"]["mu"].captured == pure["kernel"]["mu"].captured > 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_eight_devices(kind):
    """Batch axis, rows and columns are sharded; fused columns by their first axis."""
    shapes = {"stack": (4, 12, 8), "heads": (12, 2, 4)}
    specs = {"stack": P("x", None, "y"), "heads": P("x", "y")}
    axes = {"stack": lp.MatrixAxes(), "heads": lp.MatrixAxes(0, (1, 2))}
    tx, grads = adam(matrices=lp.select_matrices(axes=axes)), gradients(1, shapes)
    state = filled(tx, shapes)
    expected = diagnose(state, grads)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        sharded = {
            name: jax.device_put(g, NamedSharding(mesh, specs[name]))
            for name, g in grads.items()
        }
        state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), state, tx.init(sharded)
        )
        found = jax.jit(lp.diagnostics)(state, sharded)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected
        )


# Errors.


def test_nothing_to_diagnose():
    for tx in (optax.adam(0.1), adam(matrices=lp.select_matrices(include=[]))):
        with pytest.raises(ValueError, match="has no moment that is a pair of factors"):
            lp.diagnostics(tx.init(gradients(0)), gradients(0))
    statistics = adam(first_moment=lp.Dense(), second_moment=lp.RankOne())
    with pytest.raises(ValueError, match="has no moment that is a pair of factors"):
        lp.diagnostics(statistics.init(gradients(0)), gradients(0))


def test_gradients_of_another_tree():
    state, grads = adam().init(gradients(0)), gradients(0)
    with pytest.raises(ValueError, match="'w' is in the state, but not in the grad"):
        lp.diagnostics(state, {k: g for k, g in grads.items() if k != "w"})
    with pytest.raises(ValueError, match=r"'w': the gradient has shape \(8, 12\)"):
        lp.diagnostics(state, grads | {"w": grads["w"].T})
    with_bias = grads | {"bias": jnp.zeros(8)}
    state = adam().init(with_bias)
    with pytest.raises(ValueError, match=r"'bias': the gradient has shape \(7,\)"):
        lp.diagnostics(state, grads | {"bias": jnp.zeros(7)})


def test_two_states_of_one_moment():
    tx = optax.chain(adam(), adam())
    with pytest.raises(ValueError, match="two transforms have factors of 'mu'"):
        lp.diagnostics(tx.init(gradients(0)), gradients(0))
