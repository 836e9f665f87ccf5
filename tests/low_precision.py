"""Runs a function as a TPU would: default matmuls round their operands to bfloat16."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def as_on_tpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` with such matmuls; those in full precision stay as they are."""

    def run(*args):
        traced, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = _run(traced, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return jax.jit(run)


def _run(closed, *args):
    jaxpr, values = closed.jaxpr, {}
    values |= zip(jaxpr.constvars, closed.consts, strict=True)
    values |= zip(jaxpr.invars, args, strict=True)
    for eqn in jaxpr.eqns:
        inputs = [x.val if hasattr(x, "val") else values[x] for x in eqn.invars]
        outputs = _apply(eqn, inputs)
        values |= zip(eqn.outvars, outputs, strict=True)
    return [x.val if hasattr(x, "val") else values[x] for x in jaxpr.outvars]


def _apply(eqn, inputs):
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general" and not _is_full(params["precision"]):
        inputs = [x.astype(jnp.bfloat16).astype(x.dtype) for x in inputs]
    if name in ("jit", "pjit"):
        return _run(params["jaxpr"], *inputs)
    if name == "scan":
        return _run_scan(params, inputs)
    assert not any("jaxpr" in key for key in params), f"{name} holds a program"
    results = eqn.primitive.bind(*inputs, **params)
    return results if eqn.primitive.multiple_results else [results]


def _run_scan(params, inputs):
    fixed = params["num_consts"]
    assert len(inputs) == fixed + params["num_carry"], "a scan over arrays"
    consts, carry = inputs[:fixed], inputs[fixed:]
    body = lambda carry, _: (_run(params["jaxpr"], *consts, *carry), None)  # noqa: E731
    return jax.lax.scan(body, carry, length=params["length"])[0]


def _is_full(precision) -> bool:
    return precision is not None and all(
        x == jax.lax.Precision.HIGHEST for x in precision
    )
