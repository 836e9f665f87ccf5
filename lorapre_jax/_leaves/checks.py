"""Checks of arguments, made when a transform is built, before any compute."""

import numbers
from collections import Counter
from fractions import Fraction
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lorapre_jax._leaves.choice import Choice


def check_static(name: str, value: Any) -> None:
    """Raises an error if `optax.inject_hyperparams` made a static value an array."""
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"`{name}` decides shapes or programs, so it cannot be an array. Under "
            f"optax.inject_hyperparams, name it in `static_args=`: "
            f"inject_hyperparams(..., static_args=('{name}', ...))."
        )


def check_flag(name: str, value: Any) -> None:
    """Raises an error unless `value` is a static bool."""
    check_static(name, value)
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises an error unless `value` is a static int of at least `least`."""
    check_static(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_rank(rank: Any) -> None:
    if not isinstance(rank, Fraction):
        if isinstance(rank, float):
            raise TypeError(
                f"`rank` must be an int, or a fractions.Fraction of the smaller side "
                f"of each matrix, got {rank!r}."
            )
        check_count("rank", rank)
    elif not 0 < rank <= 1:
        raise ValueError(f"A Fraction as `rank` must be in (0, 1], got {rank}.")


def check_storage(rank: Any, slices_at_once: Any, factor_dtype: Any, seed: Any) -> None:
    """Checks the arguments that every transform has."""
    check_rank(rank)
    if slices_at_once is not None:
        check_count("slices_at_once", slices_at_once)
    check_static("factor_dtype", factor_dtype)
    try:
        name = None if factor_dtype is None else jnp.dtype(factor_dtype).name
    except TypeError:  # It is not a dtype.
        name = None
    if name not in ("bfloat16", "float32", "float64"):
        raise ValueError(
            "`factor_dtype` must be bfloat16, float32 or float64, got "
            f"{factor_dtype!r}."
        )
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("`factor_dtype` float64 needs jax_enable_x64.")
    dtype = getattr(seed, "dtype", np.dtype(type(seed)))
    if not jnp.issubdtype(dtype, jnp.integer) or jnp.shape(seed) != ():
        raise TypeError(f"`seed` must be an int, got {seed!r}.")
    if isinstance(seed, int | np.integer) and not -(2**31) <= seed < 2**31:
        raise ValueError(f"`seed` must fit into 32 bits with its sign, got {seed}.")


def check_state(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        raise TypeError(
            f"update got a {type(state).__name__}, not this transform's own state, a "
            f"{kind.__name__}: pass what its `init` or its last `update` returned. "
            "`convert_state` turns the state of one transform into that of another."
        )


def check_distinct(paths: list[str]) -> None:
    """Raises an error if two leaves share a path, since states are kept by path."""
    for path, times in Counter(paths).items():
        if times > 1:
            raise ValueError(
                f"Two leaves have the path '{path}': keys that contain slashes, or an "
                "int and its text, collide. Rename one of them."
            )


def check_array(path: str, leaf: Any) -> None:
    if isinstance(getattr(leaf, "dtype", None), str):  # Keras: arrays have no str.
        raise TypeError(
            f"Leaf '{path}' is a {type(leaf).__name__}, not an array. For a Keras "
            "model, pass the arrays by path: {v.path: v.value for v in "
            "model.trainable_variables}."
        )
    if hasattr(leaf, "dtype"):
        return
    what = f"Leaf '{path}' is a {type(leaf).__name__}, not an array"
    if isinstance(leaf, numbers.Number):
        raise TypeError(f"{what}; make it one with jnp.asarray.")
    raise TypeError(
        f"{what}. Partition out what is not a parameter, such as the activation "
        "function of a module: by eqx.filter(model, eqx.is_inexact_array) for an "
        "Equinox model, or by optax.masked around the optimizer."
    )


def check_floating(path: str, leaf: Any) -> None:
    check_array(path, leaf)
    # JAX does not promote floats of 8 bits or fewer.
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 2:
        raise TypeError(
            f"Leaf '{path}' has dtype {leaf.dtype}; only real floating-point leaves "
            "of 16 bits or more can be optimized. Cast it, or mask it out, for "
            "example with optax.masked."
        )


def check_decay(name: str, value: Any) -> None:
    """Raises an error unless `value` is in [0, 1); a tracer passes."""
    _check_number(name, value)
    if not isinstance(value, jax.core.Tracer) and not 0 <= np.float32(value) < 1:
        rounded = ", which is 1 in float32" if 0 <= float(value) < 1 else ""
        raise ValueError(f"`{name}` must be in [0, 1), got {value}{rounded}.")


def check_not_negative(name: str, value: Any) -> None:
    _check_number(name, value)
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < np.inf:
        raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")


def check_methods(choice: Choice, *needed: str) -> None:
    """Checks that each method that a leaf may get can do one of what is `needed`."""
    for method in (choice.block, choice.end, *(method for _, method in choice.rules)):
        if isinstance(method, type):
            raise TypeError(
                f"`{choice.argument}` must be a value, such as {method.__name__}(), "
                "not the class."
            )
        if not any(hasattr(method, each) for each in needed):
            what = needed[0].replace("_", " ")
            raise TypeError(f"`{choice.argument}`: {method!r} cannot keep a {what}.")


def check_moments(first: Any, second: Any, path: str = "") -> None:
    """Checks that Adam's two methods, of one leaf or of all, go together."""
    where = f"Leaf '{path}': " if path else ""
    if hasattr(second, "rotated_moment") and not hasattr(first, "split_moment"):
        raise TypeError(
            f"{where}`second_moment`: {second!r}, the default, needs the factors of a "
            f"first moment LowRank(...), got {first!r}. Pass another second moment, "
            "for example RankOne()."
        )
    if getattr(second, "residual_gain", 1.0) != 1.0:
        raise ValueError(
            f"{where}`second_moment`: {second!r}: only first moments have a "
            "gain; leave it at 1."
        )


def _check_number(name: str, value: Any) -> None:
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number; to schedule it, wrap the transform in "
            "optax.inject_hyperparams."
        )
    dtype = getattr(value, "dtype", np.dtype(float))
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"`{name}` is an array of dtype {dtype}, which rounds 0.999 to 1 or 1e-8 "
            "to 0. optax.inject_hyperparams casts every hyperparameter, also those "
            "that have their default, to the parameters' dtype: pass it "
            "hyperparam_dtype=jnp.float32."
        )
    if isinstance(value, jax.core.Tracer):
        return
    try:
        float(value)
        is_number = not isinstance(value, (str, bytes))
    except (TypeError, ValueError):
        is_number = False
    if not is_number:
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_ns_coeffs(coefficients: Any, steps: int) -> None:
    check_static("ns_coeffs", coefficients)
    try:
        values = np.asarray(coefficients, float)
        shape = values.shape if np.isfinite(values).all() else None
    except (TypeError, ValueError):  # Ragged, or not numbers.
        shape = None
    if shape != (3,) and not (
        shape and len(shape) == 2 and shape[1] == 3 and shape[0] >= steps
    ):
        raise ValueError(
            f"`ns_coeffs` must be (a, b, c), or at least ns_steps={steps} such "
            f"triples, of finite numbers; got {coefficients!r}."
        )
