"""Gradients for the baselines, and what they make of them."""

import functools
import inspect
from typing import Any

import jax
import numpy as np

P, Q = 6, 10
SIZES = np.array([1, 1, 4, 0.3, 2, 2, 8, 0.1])
"""Of the gradients by step: spikes to limit."""


def normal(shape=(P, Q), sizes=SIZES):
    """Gradients of one matrix, (steps, p, q)."""
    noise = np.random.default_rng(0).normal(size=(len(sizes), *shape))
    return noise * sizes[:, None, None]


def gradients(shapes, steps):
    """Gradients of several matrices, each (steps, p, q)."""
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=(steps, *s)) for k, s in shapes.items()}


@functools.cache
def _compiled(tx):
    def step(state, g):
        direction, state = tx.update(g, state, g)  # As params: for their shapes.
        return state, (direction, state)

    def scan(grads):
        return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)

    return jax.jit(lambda grads: scan(grads)[1])


def run(tx, grads) -> Any:
    """The directions and the states of all steps."""
    grads = jax.tree.map(np.float32, grads)
    return jax.tree.map(np.asarray, _compiled(tx)(grads))


def wide(x):
    """The last two axes, the smaller one first."""
    return x if x.shape[-2] <= x.shape[-1] else np.swapaxes(x, -2, -1)


def size_in_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def defaults(function):
    """The default values of its parameters, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
