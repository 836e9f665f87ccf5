"""Bad input: an error that names the argument or the leaf, and the mend."""

import inspect
import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapre_jax as lp

TREE = {"layer": {"w": jnp.zeros((12, 8)), "b": jnp.zeros(8)}}
AS_TEXT: Any = {"rows": "0"}
NO_AXIS: Any = {"rows": None}
NO_FLAG: Any = "no"
WRONG: Any = {"axes": (0, 1), "axes of w": {"w": None}, "include": re.compile("w")}
MATRIX = {"layer": {"w": jnp.zeros((12, 8))}}


def adam(**kwargs: Any):
    return lp.scale_by_lorapre_adam(**{"rank": 2, **kwargs})


def muon(**kwargs: Any):
    return lp.lorapre_muon(0.1, 2, **kwargs)


def regression(**kwargs: Any):
    return lp.LowRank(**kwargs)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: adam(rank=0), ValueError, "`rank` must be at least 1, got 0"),
        (lambda: adam(rank=True), TypeError, "`rank` must be an int"),
        (lambda: adam(rank=0.25), TypeError, "fractions.Fraction"),
        (lambda: adam(rank=Fraction(5, 4)), ValueError, "in (0, 1]"),
        (lambda: adam(rank=jnp.asarray(2)), TypeError, "static_args=('rank', ...)"),
        (lambda: adam(rank=np.asarray(2)), TypeError, "static_args=('rank', ...)"),
        (
            lambda: adam(slices_at_once=jnp.asarray(1)),
            TypeError,
            "static_args=('slices_at_once', ...)",
        ),
        (
            lambda: adam(slices_at_once=0),
            ValueError,
            "`slices_at_once` must be at least 1",
        ),
        (lambda: adam(b1=1.0), ValueError, "`b1` must be in [0, 1), got 1.0"),
        (lambda: adam(b2=-0.1), ValueError, "`b2` must be in [0, 1)"),
        (lambda: adam(b1=float("nan")), ValueError, "`b1` must be in [0, 1)"),
        (lambda: adam(b1=lambda _: 0.9), TypeError, "optax.inject_hyperparams"),
        (lambda: adam(eps=-1e-8), ValueError, "`eps` must be at least 0"),
        (lambda: adam(update_scale=-1), ValueError, "`update_scale`"),
        (lambda: adam(factor_dtype="int32"), ValueError, "`factor_dtype`"),
        (lambda: adam(first_moment=lp.RankOne()), TypeError, "keep a first moment"),
        (lambda: adam(second_moment=lp.RankOne), TypeError, "such as RankOne()"),
        (lambda: adam(second_moment=lp.RotatedRankOne), TypeError, "RotatedRankOne()"),
        (
            lambda: adam(first_moment=lp.Dense()),
            TypeError,
            "Pass another second moment",
        ),
        (lambda: adam(second_moment=3), TypeError, "keep a second moment"),
        (
            lambda: adam(second_moment=lp.LowRank(residual_gain=0.3)),
            ValueError,
            "only first moments have a gain",
        ),
        (lambda: lp.lorapre_ema(1.5, 2), ValueError, "`decay` must be in [0, 1)"),
        (lambda: lp.lorapre_ema(0.9, 2, NO_FLAG), TypeError, "`debias` must be True"),
        (lambda: muon(nesterov=1), TypeError, "`nesterov` must be True or False"),
        (lambda: lp.lorapre_ema(0.9, 0), ValueError, "`rank` must be at least 1"),
        (lambda: lp.lorapre_muon(0.1, 2, beta=1.0), ValueError, "`beta`"),
        (lambda: lp.lorapre_muon(0.1, 2, ns_steps=0), ValueError, "`ns_steps`"),
        (
            lambda: muon(ns_steps=jnp.asarray(5)),
            TypeError,
            "static_args=('ns_steps', ...)",
        ),
        (
            lambda: lp.lorapre_muon(0.1, 2, ns_coeffs=((1.0, 2.0, 3.0),)),
            ValueError,
            "at least ns_steps=5",
        ),
        (lambda: lp.LowRank(-1), ValueError, "at least 0, got -1"),
        (lambda: regression(residual_gain=None), ValueError, "at least 0, got None"),
        (lambda: lp.MatrixAxes(rows=()), ValueError, "at least one axis"),
        (lambda: lp.MatrixAxes((0, 1), 1), ValueError, "names an axis twice"),
        (lambda: adam(b1=np.float32(1.5)), ValueError, "`b1` must be in [0, 1)"),
        (lambda: adam(b2=jnp.asarray(1.5)), ValueError, "`b2` must be in [0, 1)"),
        (lambda: adam(factor_dtype="float8_e4m3fn"), ValueError, "`factor_dtype`"),
        (lambda: muon(adam_b2=1.5), ValueError, "`adam_b2` must be in [0, 1)"),
        (lambda: lp.MatrixAxes(**AS_TEXT), TypeError, "takes ints"),
        (lambda: lp.select_matrices(include="("), ValueError, "regular expression"),
        (lambda: adam(b1=1 - 1e-9), ValueError, "which is 1 in float32"),
        (lambda: adam(b1="a"), TypeError, "`b1` must be a number, got 'a'"),
        (lambda: adam(b1="0.9"), TypeError, "`b1` must be a number, got '0.9'"),
        (lambda: adam(eps=np.inf), ValueError, "`eps` must be at least 0 and finite"),
        (lambda: adam(seed=1.5), TypeError, "`seed` must be an int, got 1.5"),
        (lambda: muon(seed=None), TypeError, "`seed` must be an int, got None"),
        (lambda: adam(seed=2**31), ValueError, "`seed` must fit into 32 bits"),
        (lambda: adam(seed=jnp.ones(2, int)), TypeError, "`seed` must be an int"),
        (lambda: adam(factor_dtype=None), ValueError, "or float64, got None"),
        (lambda: adam(factor_dtype="half"), ValueError, "or float64, got 'half'"),
        (lambda: adam(factor_dtype="none"), ValueError, "or float64, got 'none'"),
        (lambda: muon(ns_coeffs=(1.0, np.nan, 0.0)), ValueError, "of finite numbers"),
        (lambda: lp.MatrixAxes(**NO_AXIS), TypeError, "takes ints, got None"),
        (lambda: adam(eps=jnp.ones(2)), TypeError, "`eps` must be a number"),
        (lambda: adam(factor_dtype="float64"), ValueError, "needs jax_enable_x64"),
        (lambda: muon(consistent_rms=-0.2), ValueError, "`consistent_rms` must be at"),
        (
            lambda: muon(consistent_rms=optax.constant_schedule(0.2)),
            TypeError,
            "optax.inject_hyperparams",
        ),
        (lambda: muon(ns_coeffs=((1.0, 2.0), (3.0,))), ValueError, "(a, b, c), or at"),
        (lambda: regression(residual_gain=np.inf), ValueError, "got inf"),
        (
            lambda: lp.select_matrices(axes=WRONG["axes"]),
            TypeError,
            "select_matrices: axes: (0, 1) is not a MatrixAxes",
        ),
        (
            lambda: lp.select_matrices(axes=WRONG["axes of w"]),
            TypeError,
            "select_matrices: axes of 'w': None is not a MatrixAxes",
        ),
        (
            lambda: lp.select_matrices(include=WRONG["include"]),
            TypeError,
            "include takes regular expressions as strings, got re.compile('w')",
        ),
    ],
)
def test_arguments(build, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build()


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        (lp.select_matrices("w", axes=lp.MatrixAxes(0, -2)), ValueError, "axis twice"),
        (lp.select_matrices("w", axes=lp.MatrixAxes(0, 2)), ValueError, "no axis 2"),
        (
            lp.select_matrices("layer/b", axes=lp.MatrixAxes()),
            ValueError,
            "'layer/b' of shape (8,) has no axis -2",
        ),
        (lp.select_matrices(["w", "q"]), ValueError, "include pattern 'q' matches no"),
        (lp.select_matrices("w", "embed"), ValueError, "exclude pattern 'embed'"),
        (
            lp.select_matrices(axes={"w": lp.MatrixAxes(), "r/w": lp.MatrixAxes(1, 0)}),
            ValueError,
            "leaf 'layer/w' is given different axes by two patterns",
        ),
        (lp.select_matrices("layer/b"), ValueError, "'layer/b' of shape (8,)"),
        ({"layer": {"w": lp.MatrixAxes()}}, ValueError, "no entry for leaf 'layer/b'"),
        (
            {"layer": lp.MatrixAxes(), "head": None},
            ValueError,
            "entries for 'head', where the parameters have no leaf",
        ),
        ({"layer": 3}, TypeError, "the entry at 'layer' is a int"),
        (lambda params: params, TypeError, "select_matrices(...)"),
    ],
)
@pytest.mark.parametrize("make", [adam, lambda **kw: lp.lorapre_muon(0.1, 2, **kw)])
def test_matrices(make, matrices, error, message):
    tx = make(matrices=matrices)
    with pytest.raises(error, match=re.escape(message)):
        tx.init(TREE)


def test_leaves_that_are_no_arrays():
    with pytest.raises(TypeError, match="Leaf 'layer/gain' is a float, not an array"):
        adam().init({"layer": {"gain": 1.0}})
    with pytest.raises(TypeError, match="Leaf 'layer/gain' is a float, not an array"):
        lp.describe(optax.adam(0.1), {"layer": {"gain": 1.0}})


@pytest.mark.parametrize("leaf", [jax.nn.relu, len, "gelu", object()])
@pytest.mark.parametrize(
    "ask",
    [
        lambda params: adam().init(params),
        lambda params: lp.describe(adam(), params),
        lambda params: lp.state_sharding(adam(), params),
        lambda params: muon().init(params),
    ],
)
def test_leaves_that_are_no_parameters(ask, leaf):
    """For example, an Equinox module has its activation function as a leaf."""
    params = {"layer": {"w": jnp.zeros((12, 8)), "activation": leaf}}
    message = (
        rf"Leaf 'layer/activation' is a {type(leaf).__name__}, not an array\. .* "
        r"eqx\.filter\(model, eqx\.is_inexact_array\).*optax\.masked"
    )
    with pytest.raises(TypeError, match=message):
        ask(params)


def test_they_can_be_masked():
    params = {"w": jnp.zeros((12, 8)), "activation": jax.nn.relu}
    tx = optax.masked(adam(matrices=lp.MatrixAxes()), {"w": True, "activation": False})
    state: Any = tx.init(params)
    assert state.inner_state.mu_factors.keys() == {"w"}


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("make", [adam, lambda: lp.lorapre_muon(0.1, 2)])
def test_leaves_that_are_not_real_floats(make, dtype):
    params = {"layer": {"steps": jnp.zeros(3, dtype)}}
    with pytest.raises(TypeError, match=f"Leaf 'layer/steps' has dtype {dtype}"):
        make().init(params)


def test_muon_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"Leaf 'layer/b' .* use lorapre_muon"):
        lp.scale_by_lorapre_muon(2).init(TREE)


def test_updates_of_another_tree():
    tx = adam(min_dim_size_to_factor=1)
    state = tx.init(MATRIX)
    with pytest.raises(ValueError, match="Leaf 'layer/b' is in the updates only"):
        tx.update(TREE, state)
    with pytest.raises(ValueError, match=r"shape \(8, 12\), but .* \(12, 8\)"):
        tx.update(jax.tree.map(jnp.transpose, MATRIX), state)
    # The first by name, whatever the order of hashes.
    with pytest.raises(ValueError, match="Leaf 'a' is in the updates only"):
        tx.update({name: jnp.zeros(3) for name in "zca"}, state)


@pytest.mark.parametrize("dtype", ["int32", "complex64", jax.dtypes.float0])
def test_updates_that_are_not_real_floats(dtype):
    tx = adam(matrices=lp.MatrixAxes())
    grads = {"layer": {"w": np.zeros((12, 8), dtype)}}
    with pytest.raises(TypeError, match="Leaf 'layer/w' has dtype"):
        tx.update(grads, tx.init(MATRIX))


def test_the_state_of_another_transform():
    state = optax.scale_by_adam().init(MATRIX)
    for tx in (adam(), lp.scale_by_lorapre_muon(2), lp.lorapre_ema(0.9, 2)):
        with pytest.raises(TypeError, match="update got a ScaleByAdamState"):
            tx.update(MATRIX, state)


@pytest.mark.parametrize("name", ["rank", "min_dim_size_to_factor"])
def test_static_arguments_under_inject_hyperparams(name):
    given = {"rank": 2, "min_dim_size_to_factor": 8}
    factory = optax.inject_hyperparams(
        lp.lorapre_adamw, static_args=given.keys() - {name}
    )
    with pytest.raises(TypeError, match=rf"static_args=\('{name}', ...\)"):
        factory(1e-3, **given).init(MATRIX)


TRANSFORMS = (
    "lorapre_adamw",
    "lorapre_ema",
    "lorapre_muon",
    "scale_by_lorapre_adam",
    "scale_by_lorapre_muon",
)
REQUIRED = {"learning_rate": 1e-2, "rank": 1, "decay": 0.9}


def injected(name, **options: Any):
    """Returns an injected transform without optional arguments, with a static rank."""
    factory = getattr(lp, name)
    parameters = inspect.signature(factory).parameters.values()
    required = {p.name: REQUIRED[p.name] for p in parameters if p.default is p.empty}
    wrapped = optax.inject_hyperparams(factory, static_args="rank", **options)
    return wrapped(**required)


def test_these_are_all_transforms():
    takes_rank = {
        name
        for name in lp.__all__
        if not isinstance(getattr(lp, name), type)
        and "rank" in inspect.signature(getattr(lp, name)).parameters
    }
    assert takes_rank == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_nobody_gave_is_no_static_hyperparameter(name):
    """Tested on a factored leaf, at `init` and at `update`."""
    tx, params = injected(name), {"w": jnp.zeros((128, 130))}
    state = jax.eval_shape(tx.init, params)
    (leaf,) = lp.describe(tx, params).leaves
    assert leaf.is_factored
    jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_hyperparameters_in_half_precision(name, dtype):
    """optax casts them to the parameters' dtype, in which 0.999 would be 1."""
    params = {"w": jnp.zeros((128, 130), dtype)}
    for init in (injected(name).init, jax.jit(injected(name).init)):
        with pytest.raises(
            TypeError, match=rf"is an array of dtype {dtype}, .* hyperparam_dtype="
        ):
            init(params)
    tx = injected(name, hyperparam_dtype=jnp.float32)
    state: Any = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)
    halved = state._replace(
        hyperparams={
            name: jax.ShapeDtypeStruct(x.shape, x.dtype if name == "seed" else dtype)
            for name, x in state.hyperparams.items()
        }
    )
    with pytest.raises(TypeError, match="pass it hyperparam_dtype="):
        jax.eval_shape(tx.update, params, halved, params)


def test_paths_that_collide():
    params = {"a/b": jnp.zeros(3), "a": {"b": jnp.zeros(4)}}
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        adam().init(params)


def test_nothing_is_raised_where_there_is_nothing_to_see():
    selection = lp.select_matrices(["nothing like it"])
    masked = {"w": optax.MaskedNode()}
    params: Any
    for params in ({}, masked, {"w": None}):
        adam(matrices=selection).init(params)


def test_rules_about_masked_leaves_are_no_mistake():
    tx = optax.masked(
        adam(matrices=lp.select_matrices("w", exclude="b")),
        {"layer": {"w": True, "b": False}},
    )
    tx.init(TREE)


class KerasVariable:
    """Like a parameter of Keras, whose dtype is a string."""

    dtype = "float32"
    shape = (16, 32)
    value = jnp.zeros((16, 32))


@pytest.mark.parametrize(
    "ask",
    [
        lambda params: adam().init(params),
        lambda params: lp.describe(adam(), params),
        lambda params: lp.state_sharding(adam(), params),
        lambda params: lp.lorapre_muon(0.1, 2).init(params),
    ],
)
def test_variables_of_keras(ask):
    with pytest.raises(TypeError, match="Leaf '0' is a KerasVariable, not an array"):
        ask([KerasVariable()])
