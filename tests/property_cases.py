"""Transforms and methods on small matrices, and what runs them for a few steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorapre_jax as lp
from lorapre_jax._leaves.plan import FactoredLeaf

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
