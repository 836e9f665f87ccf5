"""The optax contract: what every transform of ours does, on leaves that it factors."""

import copy
import functools
import inspect
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import (
    CASES,
    COMMON,
    FACTORED,
    Case,
    assert_close,
    assert_same,
    factored_paths,
    plan_of,
    random_tree,
    run,
)

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

tree_get = optax.tree_utils.tree_get

HALF = [jnp.bfloat16, jnp.float16, jnp.float32]
PAIRS = list(itertools.product(HALF, HALF))
ALIASES = [name for name, case in CASES.items() if case.is_alias]
TRANSFORMS = [name for name, case in CASES.items() if not case.is_alias]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def gradients(case: Case, steps: int = 3, dtype: Any = jnp.float32) -> list[Any]:
    return [case.tree(seed, dtype) for seed in range(1, steps + 1)]


def only_w(case: Case, **overrides) -> optax.GradientTransformationExtraArgs:
    return case.make(matrices=lp.MatrixAxes(), **overrides)


def w_trees(*seeds: int) -> list[dict[str, jax.Array]]:
    return [random_tree({"w": (12, 8)}, seed) for seed in seeds]


def is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


# What is public.


def test_nothing_else_is_public():
    names = {name for name in dir(lp) if not name.startswith("_")}
    assert names == set(lp.__all__)
    assert names == {
        "Dense",
        "MatrixAxes",
        "OnlineRegression",
        "RankOne",
        "RotatedRankOne",
        "check_state_record",
        "convert_state",
        "describe",
        "diagnostics",
        "lorapre_adamw",
        "lorapre_ema",
        "lorapre_muon",
        "rank_for_budget",
        "scale_by_lorapre_adam",
        "scale_by_lorapre_muon",
        "select_matrices",
        "state_record",
        "state_sharding",
    }


@pytest.mark.parametrize("alias", [lp.lorapre_adamw, lp.lorapre_muon])
def test_learning_rate_annotation_is_an_object(alias):
    """optax's checks and config tools compare it, so it may not be a string."""
    annotation = inspect.signature(alias).parameters["learning_rate"].annotation
    assert annotation == optax.ScalarOrSchedule
    assert not isinstance(annotation, str)


# The state.


def test_every_matrix_of_the_cases_is_factored(case):
    tx, params = case.make(), case.tree()
    assert factored_paths(tx, params) == FACTORED
    in_state = [tree_get(tx.init(params), factors) for _, factors in case.fields]
    assert frozenset().union(*in_state) == FACTORED


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_is_a_named_tuple_of_its_own(name):
    case = CASES[name]
    state: Any = case.make().init(case.tree())
    assert type(state).__name__ in {
        "ScaleByLorapreAdamState",
        "ScaleByLorapreMuonState",
        "LorapreEmaState",
    }
    pairs = itertools.chain(*case.fields)
    assert set(type(state)._fields) == {"count", *pairs, "plan"}


def test_count_is_int32_and_saturates(case):
    """At its maximum it must stay there: an overflow would restart bias correction."""
    tx, params = case.make(), case.tree()
    state = tx.init(params)
    most = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)

    def is_count(path, x):
        del x
        return getattr(path[-1], "name", None) == "count"

    counts = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state) if is_count(path, x)
    ]
    assert counts
    assert all(count.dtype == jnp.int32 and count.shape == () for count in counts)
    late = jax.tree_util.tree_map_with_path(
        lambda path, x: most if is_count(path, x) else x, state
    )
    updates, late = tx.update(case.tree(1), late, params)
    for path, x in jax.tree_util.tree_leaves_with_path(late):
        if is_count(path, x):
            assert x == most
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_factors_are_dicts_by_leaf_path(case):
    """Paths join what stands on the way to the leaf, list positions included."""
    params = {"blocks": [{"w": jnp.ones((12, 8))}, {"w": jnp.ones((12, 8))}]}
    state = only_w(case).init(params)
    held = [tree_get(state, name) for _, name in case.fields]
    assert all(type(factors) is dict for factors in held)
    assert {path for factors in held for path in factors} == {
        "blocks/0/w",
        "blocks/1/w",
    }


def test_dense_moments_keep_the_parameter_tree(case):
    """With MaskedNode exactly where the moment is factored."""
    params = case.tree()
    state = case.make().init(params)
    for tree_name, factors_name in case.fields:
        factors = tree_get(state, factors_name)
        trees = optax.tree_utils.tree_get_all_with_path(state, tree_name)
        kept = [tree for _, tree in trees]
        for tree in kept:
            assert jax.tree.structure(tree, is_leaf=is_masked) == (
                jax.tree.structure(params)
            )
        for name, param in params.items():
            held = [tree[name] for tree in kept if not is_masked(tree[name])]
            # The alias of Muon leaves what is no matrix to Adam, in fields of its own.
            elsewhere = case.factory is lp.lorapre_muon and name == "bias"
            assert len(held) == (0 if name in factors or elsewhere else 1)
            for moment in held:
                assert moment.shape == param.shape


def test_no_array_in_the_state_is_empty(case):
    """Orbax refuses to write zero-size arrays."""
    params = case.tree() | {"empty": jnp.zeros((0, 4))}
    state = case.make().init(params)
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def test_plan_is_static_and_without_leaves(case):
    state = case.make().init(case.tree())
    plan = plan_of(state)
    assert jax.tree.leaves(plan) == []
    again = plan_of(case.make().init(case.tree(7)))
    assert again is not plan
    assert again == plan
    assert hash(again) == hash(plan)
    assert jax.tree.structure(plan) == jax.tree.structure(again)
    assert plan != plan_of(case.make(rank=1).init(case.tree()))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_plan_survives_copies(case, copied):
    plan = plan_of(case.make().init(case.tree()))
    again = copied(plan)
    assert again == plan
    assert hash(again) == hash(plan)
    assert jax.tree.structure(again) == jax.tree.structure(plan)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tree_get_finds_every_field(name):
    case = CASES[name]
    state: Any = case.make().init(case.tree())
    for field in state._fields:
        found = tree_get(state, field)
        assert found is getattr(state, field)


# Initialisation.


def test_init_is_the_same_from_anything(case):
    """Arrays, abstract values, `eval_shape` and jit; and it draws nothing anew."""
    tx, params = case.make(), case.tree()
    abstract = jax.eval_shape(lambda: params)
    state = tx.init(params)
    assert_same(tx.init(params), state)
    assert_same(tx.init(case.tree(5)), state)
    assert_close(jax.jit(tx.init)(params), state, rtol=1e-6, atol=0)
    assert_same(tx.init(abstract), state)
    shaped = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shaped) == jax.tree.structure(state)
    assert shapes_of(shaped) == shapes_of(state)
    assert shapes_of(jax.eval_shape(tx.init, abstract)) == shapes_of(state)


def test_each_tree_field_is_optax_placeholder(case):
    class Placeholder:
        pass

    tx = case.make()
    jax.tree_util.register_pytree_node(
        Placeholder, lambda _: ((), None), lambda *_: Placeholder()
    )
    placeholder = Placeholder()
    state = tx.init(placeholder)
    for field in itertools.chain(*case.fields, ["plan"]):
        for _, found in optax.tree_utils.tree_get_all_with_path(state, field):
            assert isinstance(found, Placeholder), field


def test_tree_map_params_reaches_all_moments(case):
    """And nothing else: neither the count nor the learning rate's state."""
    tx, params = case.make(), case.tree()
    _, state = run(tx, params, gradients(case, 1))
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    assert_same(same, state)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    for (path, was), now in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(doubled),
        strict=True,
    ):
        factor = 1 if getattr(path[-1], "name", None) == "count" else 2
        np.testing.assert_array_equal(np.asarray(now), factor * np.asarray(was))


# Leaves that are not matrices.


def test_odd_leaves_pass_through(case):
    """None, MaskedNode and empty leaves come back; a scalar gets optax's update."""
    scalar = {} if case.only_matrices else {"scalar": jnp.float32(0.5)}
    odd = {"none": None, "masked": optax.MaskedNode(), "empty": jnp.zeros((0, 3))}
    tx = case.make()
    params, grads = (case.tree(seed) | odd | scalar for seed in (0, 1))
    assert factored_paths(tx, params) == FACTORED
    updates, state = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert updates["empty"].shape == (0, 3)
    if scalar:
        expected, _ = run(case.reference, scalar, [{"scalar": grads["scalar"]}])
        assert_close(updates["scalar"], expected[0]["scalar"])
    without, _ = run(tx, case.tree(), [case.tree(1)])
    assert_close({name: updates[name] for name in without[0]}, without[0])
    tx.update(grads, state, params)


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": optax.MaskedNode()}], ids=str)
def test_nothing_to_optimize(case, tree):
    tx = case.make()
    state = tx.init(tree)
    updates, state = tx.update(tree, state, tree)
    assert updates == tree
    tx.update(tree, state, tree)


def test_zero_gradients_give_finite_updates(case):
    """And do not spoil what follows: the same as had they never been, but for time."""
    params = case.tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = run(case.make(), params, [zeros, zeros, *gradients(case, 2)])
    for leaf in jax.tree.leaves(updates[:2]):
        assert bool((leaf == 0).all())
    for leaf in jax.tree.leaves(updates[2:]):
        assert bool(jnp.isfinite(leaf).all())
        assert bool((leaf != 0).any())


# Dtypes and compilation.


@pytest.mark.parametrize(("grad_dtype", "param_dtype"), PAIRS)
def test_dtypes_of_updates_and_state(case, grad_dtype, param_dtype):
    """Updates have the dtype of optax's, and the state does not change in scan, cond.

    Tracing is enough: JAX raises where a carry or a branch changes its type.
    """
    tx, params = case.make(), case.tree(dtype=param_dtype)
    state, grads = tx.init(params), case.tree(1, grad_dtype)

    def step(state, grads):
        updates, new = tx.update(grads, state, params)
        return jax.lax.cond(grads["w"][0, 0] > 0, lambda: new, lambda: state), updates

    after, updates = jax.eval_shape(
        functools.partial(jax.lax.scan, step),
        state,
        jax.tree.map(lambda g: jnp.stack([g, -g]), grads),
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert shapes_of(after) == shapes_of(state)

    param, grad = {"w": params["w"]}, {"w": grads["w"]}
    expected = jax.eval_shape(
        lambda p, g: case.reference.update(g, case.reference.init(p), p)[0], param, grad
    )
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == expected["w"].dtype


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_dtypes_do_not_depend_on_the_parameters(name):
    """Float32 at least, so that a bfloat16 model loses nothing between steps."""
    case = CASES[name]
    dtypes = [
        [leaf.dtype for leaf in jax.tree.leaves(case.make().init(case.tree(dtype=d)))]
        for d in HALF
    ]
    assert dtypes[0] == dtypes[1] == dtypes[2]
    assert set(dtypes[0]) == {jnp.dtype("int32"), jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_follows_single_precision(case, dtype):
    """The arithmetic between two half-precision ends is single."""
    params = case.tree()
    grads = [jax.tree.map(lambda g: g.astype(dtype), g) for g in gradients(case)]
    single = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in grads]
    expected, _ = run(case.make(), params, single)
    half = jax.tree.map(lambda p: p.astype(dtype), params)
    updates, _ = run(case.make(), half, grads)
    for name in FACTORED:
        for step in range(3):
            assert updates[step][name].dtype == dtype
            rounded = expected[step][name].astype(dtype)
            np.testing.assert_allclose(
                np.asarray(updates[step][name], np.float32),
                np.asarray(rounded, np.float32),
                rtol=2e-2,
                atol=1e-3,
            )


def test_factors_in_bfloat16(case):
    params = case.tree()
    tx = case.make(factor_dtype="bfloat16")
    assert factored_paths(tx, params) == FACTORED
    updates, state = run(tx, params, gradients(case))
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))
    pairs = 0
    for _, name in case.fields:
        for factors in tree_get(state, name).values():
            # The row and column statistics of RankOne are too small to be worth it.
            if hasattr(factors, "left"):
                pairs += 1
                assert factors.left.dtype == factors.right.dtype == jnp.bfloat16
            else:
                assert factors.row.dtype == factors.column.dtype == jnp.float32
    assert pairs
    single, _ = run(case.make(), params, gradients(case))
    for name in FACTORED:
        scale = float(jnp.abs(single[-1][name]).max())
        difference = float(jnp.abs(updates[-1][name] - single[-1][name]).max())
        assert 0 < difference < 0.1 * scale


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("grad_dtype", "param_dtype"),
    list(itertools.product([jnp.bfloat16, jnp.float32], repeat=2)),
)
def test_strict_dtype_promotion(name, grad_dtype, param_dtype):
    """Tracing is enough: JAX raises where two dtypes meet."""
    case = CASES[name]
    tx, params = case.make(), case.tree(dtype=param_dtype)
    grads = case.tree(1, grad_dtype)
    expected = jax.eval_shape(tx.update, grads, tx.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        assert factored_paths(tx, params) == FACTORED
        outcome = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert shapes_of(outcome) == shapes_of(expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_x64(name):
    """It changes nothing in single precision, and double precision is double."""
    case = CASES[name]
    params, *grads = w_trees(0, 1, 2)
    single, single_state = run(only_w(case), params, grads, jit=True)
    with jax.enable_x64(True):
        assert factored_paths(only_w(case), params) == {"w"}
        updates, state = run(only_w(case), params, grads, jit=True)
        assert shapes_of(state) == shapes_of(single_state)
        assert_close(updates, single, rtol=1e-4, atol=2e-4)

        double = [
            {"w": jnp.asarray(tree["w"], jnp.float64)} for tree in (params, *grads)
        ]
        tx = only_w(case, factor_dtype="float64")
        assert factored_paths(tx, double[0]) == {"w"}
        updates, state = run(tx, double[0], double[1:], jit=True)
        assert shapes_of(state) == shapes_of(tx.init(double[0]))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("int32"), jnp.dtype("float64")}
    assert updates[-1]["w"].dtype == jnp.float64
    difference = np.abs(np.asarray(updates[-1]["w"]) - np.asarray(single[-1]["w"]))
    assert 0 < difference.max() < 2e-2 * np.abs(single[-1]["w"]).max()


def test_traced_once_and_converges(case):
    """A quadratic in every leaf; the second call of `update` compiles nothing."""
    target = case.tree(1)
    steps = 300
    tx = case.make_optimizer(optax.cosine_decay_schedule(0.1, steps))
    params = case.tree()
    assert factored_paths(tx, params) == FACTORED
    traces = []

    def loss(params):
        errors = jax.tree.map(lambda w, t: jnp.sum((w - t) ** 2), params, target)
        return sum(jax.tree.leaves(errors)) / 2

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = loss(params), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert len(traces) == 1
    assert loss(params) < 1e-3 * first


# How updates are called and composed.


def test_params_and_extra_arguments_are_optional(case):
    params, grads = case.tree(), case.tree(1)
    tx = case.make()
    state = tx.init(params)
    expected = tx.update(grads, state, params)
    assert_same(tx.update(grads, state), expected)
    assert_same(tx.update(grads, state, params, value=1.0, unknown="x"), expected)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_chain(case):
    params, grads = case.tree(), gradients(case)
    halves = [jax.tree.map(lambda g: g / 2, g) for g in grads]
    expected, _ = run(case.make(), params, halves)
    chained = optax.chain(optax.scale(0.5), case.make(), optax.scale(2.0))
    assert factored_paths(chained, params) == FACTORED
    updates, _ = run(chained, params, grads)
    assert_close(updates, jax.tree.map(lambda u: 2 * u, expected))


def test_inject_hyperparams_equals_plain(case):
    """Numbers become tracers there, also those that no one schedules."""
    params, *grads = w_trees(0, 1, 2)
    kwargs = case.kwargs | {"matrices": lp.MatrixAxes()}
    expected, expected_state = run(case.factory(**kwargs), params, grads)
    tx = optax.inject_hyperparams(case.factory, case.static_args)(**kwargs)
    assert factored_paths(tx, params) == {"w"}
    state: Any = jax.jit(tx.init)(params)
    assert case.decay in state.hyperparams
    update = jax.jit(tx.update)
    for grad, plain in zip(grads, expected, strict=True):
        updates, state = update(grad, state, params)
        assert_close(updates, plain, rtol=1e-4, atol=2e-4)
    assert_close(state.inner_state, expected_state, rtol=1e-4, atol=1e-5)


def test_inject_hyperparams_schedules_a_decay(case):
    def schedule(step):
        return 0.5 + 0.1 * step

    params, grads = case.tree(), gradients(case)
    kwargs = case.kwargs | {case.decay: schedule}
    tx = optax.inject_hyperparams(case.factory, case.static_args)(**kwargs)
    updates, _ = run(tx, params, grads)
    state = case.make().init(params)
    for step, grad in enumerate(grads):
        plain = case.make(**{case.decay: schedule(step)})
        expected, state = plain.update(grad, state, params)
        assert_close(updates[step], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ALIASES)
def test_inject_hyperparams_takes_a_learning_rate_schedule(name):
    case = CASES[name]
    schedule = optax.linear_schedule(0.1, 0.01, 3)
    params, grads = case.tree(), gradients(case)
    kwargs = case.kwargs | {"learning_rate": schedule}
    tx = optax.inject_hyperparams(case.factory, case.static_args)(**kwargs)
    updates, _ = run(tx, params, grads)
    expected, _ = run(case.make(learning_rate=schedule), params, grads)
    assert_close(updates, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [(name, static) for name in CASES for static in CASES[name].static_args],
)
def test_forgotten_static_argument_raises_helpfully(name, forgotten):
    case = CASES[name]
    # `min_dim_size_to_factor` is read only where nothing else says what is a matrix.
    matrices = None if forgotten == "min_dim_size_to_factor" else lp.MatrixAxes()
    static = tuple(arg for arg in case.static_args if arg != forgotten)
    kwargs = case.kwargs | {"matrices": matrices}
    (params,) = w_trees(0)
    with pytest.raises(TypeError, match=rf"(?s){forgotten}.*static_args"):
        optax.inject_hyperparams(case.factory, static)(**kwargs).init(params)


@pytest.mark.parametrize("name", ALIASES)
def test_constant_schedule_equals_its_constant(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case)
    expected, _ = run(case.make(learning_rate=0.03), params, grads)
    schedule = optax.constant_schedule(0.03)
    updates, _ = run(case.make(learning_rate=schedule), params, grads)
    assert_close(updates, expected)
    other, _ = run(case.make(learning_rate=0.06), params, grads)
    assert_close(other, jax.tree.map(lambda u: 2 * u, expected))


def test_multi_steps_equals_the_averaged_gradient(case):
    params, *grads = w_trees(0, 1, 2, 3, 4)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in (grads[:2], grads[2:])
    ]
    expected, _ = run(only_w(case), params, means)
    multi = optax.MultiSteps(only_w(case), every_k_schedule=2)
    tx = multi.gradient_transformation()
    assert factored_paths(tx, params) == {"w"}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, params)
        if step % 2:
            assert_close(updates, expected[step // 2], rtol=1e-4, atol=2e-4)
        else:
            assert not updates["w"].any()


def test_apply_if_finite_keeps_the_state(case):
    """Bit for bit, after a gradient with a single NaN."""
    params, good, bad = w_trees(0, 1, 2)
    bad = {"w": bad["w"].at[3, 3].set(jnp.nan)}
    tx = optax.apply_if_finite(only_w(case), max_consecutive_errors=3)
    assert factored_paths(tx, params) == {"w"}
    update = jax.jit(tx.update)
    _, before = update(good, tx.init(params), params)
    updates, after = update(bad, before, params)
    assert not updates["w"].any()
    assert_same(after.inner_state, before.inner_state)
    assert after.total_notfinite == 1
    updates, after = update(good, after, params)
    assert bool(jnp.isfinite(updates["w"]).all())


def test_masked(case):
    """A masked leaf comes back as it went in, and nothing is stored for it."""
    params, grads = case.tree(), gradients(case)
    mask = dict.fromkeys(params, True) | {"stack": False}
    tx = optax.masked(case.make(), mask)
    assert factored_paths(tx, params) == FACTORED - {"stack"}
    updates, state = run(tx, params, grads)
    full, _ = run(case.make(), params, grads)
    for step, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        assert_same(update["stack"], grad["stack"])
        for name in params.keys() - {"stack"}:
            assert_close(update[name], full[step][name])
    for _, name in case.fields:
        assert "stack" not in tree_get(state, name)


@pytest.mark.parametrize("wrap", [optax.partition, optax.multi_transform])
def test_partition(case, wrap):
    params, grads = case.tree(), gradients(case, 2)
    labels = dict.fromkeys(params, "ours") | {"w": "sgd"}
    tx = wrap({"ours": case.make(), "sgd": optax.sgd(0.5)}, labels)
    assert factored_paths(tx, params) == FACTORED - {"w"}
    updates, _ = run(tx, params, grads)
    full, _ = run(case.make(), params, grads)
    for step, (update, grad) in enumerate(zip(updates, grads, strict=True)):
        assert_close(update["w"], -0.5 * grad["w"])
        for name in params.keys() - {"w"}:
            assert_close(update[name], full[step][name])


# Matrices inside of leaves.


def test_a_stack_equals_its_layers(case):
    """Nothing mixes across batch slices, whatever their number or scale."""
    layers = [w_trees(2 * i, 2 * i + 1, 2 * i + 2) for i in range(3)]
    for i, trees in enumerate(layers):
        layers[i] = [{"w": 10.0**i * tree["w"]} for tree in trees]
    alone = [run(only_w(case), params, grads)[0] for params, *grads in layers]
    params, *grads = (
        {"stack": jnp.stack([tree["w"] for tree in trees])}
        for trees in zip(*layers, strict=True)
    )
    assert factored_paths(only_w(case), params) == {"stack"}
    stacked, _ = run(only_w(case), params, grads)
    for i, step in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(
            stacked[step]["stack"][i],
            alone[i][step]["w"],
            rtol=1e-4,
            atol=1e-5 * (10**i if case.factory is lp.lorapre_ema else 1),
        )


@pytest.mark.parametrize(
    ("name", "batch"), [("adam", 1), *((name, 3) for name in TRANSFORMS)]
)
def test_batch_changes_nothing_but_memory(name, batch):
    """Over two batch axes; of 4 slices, "at most 3 at once" means 2."""
    case = CASES[name]
    params, *grads = (random_tree({"w": (4, 2, 12, 8)}, seed) for seed in range(3))

    def outcome(batch):
        tx = only_w(case, batch=batch)
        assert factored_paths(tx, params) == {"w"}
        jaxpr = str(jax.make_jaxpr(tx.update)(grads[0], tx.init(params)))
        assert ("dynamic_update_slice" in jaxpr) == (batch is not None)
        return run(tx, params, grads, jit=True)

    assert_close(outcome(batch), outcome(None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "view"),
    [
        (lp.MatrixAxes(0, (1, 2)), lambda w: w.reshape(12, 2, 4)),
        (lp.MatrixAxes(1, (0, 2)), lambda w: w.reshape(12, 2, 4).swapaxes(0, 1)),
        (lp.MatrixAxes((1, 2), 0), lambda w: w.T.reshape(8, 3, 4)),
    ],
    ids=["heads", "heads_first", "transposed"],
)
def test_other_axes_equal_the_plain_matrix(case, axes, view):
    plain = w_trees(0, 1, 2)
    viewed = [{"w": view(tree["w"])} for tree in plain]
    tx = case.make(matrices=axes)
    assert factored_paths(tx, viewed[0]) == {"w"}
    expected, _ = run(only_w(case), plain[0], plain[1:])
    updates, _ = run(tx, viewed[0], viewed[1:])
    assert_close(updates, [{"w": view(update["w"])} for update in expected])


def test_muon_dimension_numbers_mean_the_same(case):
    params, *grads = w_trees(0, 1, 2)
    theirs = case.make(matrices=optax.contrib.MuonDimensionNumbers(0, 1))
    ours = case.make(matrices=lp.MatrixAxes(0, 1))
    assert factored_paths(theirs, params) == {"w"}
    assert_same(run(theirs, params, grads), run(ours, params, grads))
    # Rows and columns swapped: another matrix, so another random start or scale.
    swapped = case.make(matrices=optax.contrib.MuonDimensionNumbers(1, 0))
    assert plan_of(swapped.init(params)) != plan_of(ours.init(params))


# What the arguments do.


def test_seed_decides_the_random_start(case):
    params, grads = case.tree(), gradients(case)
    updates, _ = run(case.make(seed=3), params, grads)
    again, _ = run(case.make(seed=3), params, grads)
    other, _ = run(case.make(seed=4), params, grads)
    assert_same(again, updates)
    for name in FACTORED:
        difference = jnp.abs(other[-1][name] - updates[-1][name]).max()
        assert difference > 1e-4 * jnp.abs(updates[-1][name]).max()


@pytest.mark.parametrize("name", [n for n in CASES if n != "ema"])
def test_update_scale_is_for_factored_leaves(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case)
    whole, _ = run(case.make(), params, grads)
    scaled, _ = run(case.make(update_scale=0.25), params, grads)
    for before, after in zip(whole, scaled, strict=True):
        for leaf in before:
            factor = 0.25 if leaf in FACTORED else 1
            assert_close(after[leaf], factor * before[leaf])


@pytest.mark.parametrize("name", ALIASES)
def test_update_scale_leaves_weight_decay_alone(name):
    case = CASES[name]
    params, grads = case.tree(), case.tree(1)
    decayed, plain = (
        run(case.make(update_scale=0.25, weight_decay=wd), params, [grads])[0][0]
        for wd in (0.1, 0.0)
    )
    for leaf in FACTORED:
        decay = -0.01 * 0.1 * params[leaf]
        assert_close(decayed[leaf] - plain[leaf], decay, rtol=1e-3)


MASKS = {
    "all": None,
    "tree": {"bias": False, "heads": True, "stack": False, "w": True},
    "function": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_adamw_decays_as_optax_does(mask):
    case = CASES["adamw"]
    params, grads = case.tree(), gradients(case)
    kwargs = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "mask": mask}
    expected, _ = run(optax.adamw(0.01, **kwargs), params, grads)
    dense = case.make(first_moment=lp.Dense(), second_moment=lp.Dense(), **kwargs)
    assert not factored_paths(dense, params)
    updates, _ = run(dense, params, grads)
    assert_close(updates, expected)
    kwargs["weight_decay"] = 0.0
    factored, _ = run(case.make(**kwargs), params, grads[:1])
    kwargs["weight_decay"] = 0.1
    decayed, _ = run(case.make(**kwargs), params, grads[:1])
    decays: Any = mask(params) if callable(mask) else mask
    decays = decays or dict.fromkeys(params, True)
    for leaf, decay in decays.items():
        expected_decay = -0.01 * 0.1 * params[leaf] * decay
        actual = decayed[0][leaf] - factored[0][leaf]
        assert_close(actual, expected_decay, rtol=1e-3)


# Parity with optax where everything is dense.


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_dense_adam_is_optax_adam(name):
    case = CASES[name]
    params, grads = case.tree(), gradients(case, 10)
    dense = {"first_moment": lp.Dense(), "second_moment": lp.Dense()}
    tx = case.make(b1=0.8, b2=0.97, eps=1e-6, **dense)
    assert not factored_paths(tx, params)
    updates, state = run(tx, params, grads)
    theirs: Any = optax.scale_by_adam if name == "adam" else (
        lambda *args: optax.adamw(0.01, *args, weight_decay=0.0)
    )  # fmt: skip
    expected, expected_state = run(theirs(0.8, 0.97, 1e-6), params, grads)
    assert_close(updates, expected)
    for field in ("mu", "nu"):
        assert_close(tree_get(state, field), tree_get(expected_state, field))


@pytest.mark.parametrize(
    ("nesterov", "consistent_rms"), [(True, None), (False, None), (True, 0.2)]
)
def test_dense_muon_is_optax_muon(nesterov, consistent_rms):
    case = CASES["muon"]
    params, grads = case.tree(), gradients(case, 10)
    numbers = optax.contrib.MuonDimensionNumbers
    shared = {
        "beta": 0.9,
        "nesterov": nesterov,
        "consistent_rms": consistent_rms,
        "weight_decay": 0.1,
        "adam_b1": 0.8,
        "adam_weight_decay": 0.2,
        "adam_learning_rate": 0.03,
    }
    dimension_numbers: Any = {
        "bias": None,
        "heads": numbers((0,), (1, 2)),
        "stack": numbers(1, 2),
        "w": numbers(),
    }
    theirs = optax.contrib.muon(
        0.01, muon_weight_dimension_numbers=dimension_numbers, **shared
    )
    ours = case.make(moment=lp.Dense(), **shared)
    assert not factored_paths(ours, params)
    updates, _ = run(ours, params, grads, jit=True)
    expected, _ = run(theirs, params, grads, jit=True)
    if nesterov:  # Which optax hands on to Adam, and we do not.
        for tree in (*updates, *expected):
            del tree["bias"]
    assert_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
def test_dense_ema_is_optax_ema(debias):
    case = CASES["ema"]
    params, grads = case.tree(), gradients(case, 10)
    tx = case.make(moment=lp.Dense(), debias=debias)
    assert not factored_paths(tx, params)
    updates, state = run(tx, params, grads)
    expected, expected_state = run(optax.ema(0.9, debias), params, grads)
    assert_close(updates, expected)
    assert_close(tree_get(state, "ema"), tree_get(expected_state, "ema"))


MOMENTUM_METHODS = {
    "heavy_ball": lambda ema: optax.chain(ema, optax.sgd(0.1 / (1 - 0.9))),
    "signum": lambda ema: optax.chain(
        ema, optax.scale_by_sign(), optax.sgd(optax.linear_schedule(0.05, 0.0, 200))
    ),
}


@pytest.mark.parametrize("method", MOMENTUM_METHODS.values(), ids=MOMENTUM_METHODS)
def test_momentum_methods_are_chains_around_the_average(method):
    (target,) = w_trees(1)
    tx = method(lp.lorapre_ema(0.9, 2, debias=False, matrices=lp.MatrixAxes()))
    params = jax.tree.map(jnp.zeros_like, target)
    assert factored_paths(tx, params) == {"w"}

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda w, t: 0.1 * (w - t), params, target)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=200)[0]

    trained, _ = train(params, tx.init(params))
    first = float(jnp.mean(target["w"] ** 2))
    assert float(jnp.mean((trained["w"] - target["w"]) ** 2)) < 1e-2 * first


def test_dense_heavy_ball_is_optax_momentum():
    params, *grads = w_trees(*range(6))
    ours = MOMENTUM_METHODS["heavy_ball"](
        lp.lorapre_ema(0.9, 2, debias=False, moment=lp.Dense())
    )
    updates, _ = run(ours, params, grads)
    expected, _ = run(optax.sgd(0.1, momentum=0.9), params, grads)
    assert_close(updates, expected, rtol=1e-4)


def test_default_matrices_are_large_two_axis_leaves():
    """The rule that holds where no one says what is a matrix."""
    shapes = {"wide": (16, 24), "thin": (16, 4), "stack": (2, 16, 24), "bias": (24,)}
    tx = lp.scale_by_lorapre_adam(2, min_dim_size_to_factor=8)
    assert factored_paths(tx, random_tree(shapes)) == {"wide"}
    named = lp.scale_by_lorapre_adam(**COMMON)
    assert factored_paths(named, CASES["adam"].tree()) == FACTORED


def test_a_rank_that_does_not_pay_is_reported(case):
    """12 x 8 at rank 5: the factors of a moment would hold 100 numbers, not 96."""
    (params,) = w_trees(0)
    (leaf,) = lp.describe(only_w(case, rank=5), params).leaves
    assert not leaf.is_factored
    assert "does not pay" in leaf.dense
    (leaf,) = lp.describe(only_w(case, rank=4), params).leaves
    assert leaf.is_factored
