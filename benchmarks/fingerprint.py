"""What a method of the race computes, as a few numbers that its results keep.

They come from 20 steps on fixed small gradients, and have four digits. A new name, a
comment or another order of sums does not change them; another rule does. They are not
hashed: another order of sums turns some last digits, and with them a hash. So two
fingerprints are compared with a tolerance. What first happens after 20 steps is not
seen, such as a second projection.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.methods import B2, Method

STEPS = 20
SPIKE = 10
SEEN = (0, SPIKE + 1, STEPS - 1)
"""Steps whose updates are looked at: the first, the one after the spike, the last."""
WIDTH = 128
"""Of the smaller Llama of the race."""
MATRICES = {"layers/tall/kernel": (160, WIDTH), "layers/wide/kernel": (WIDTH, 160)}
EMBEDDINGS = {"embed/embedding": (160, WIDTH), "head/kernel": (WIDTH, 160)}
Shapes = Mapping[str, tuple[int, int]]


@functools.cache
def of(method: Method) -> list[float]:
    """Of the rule for the matrices, and of one for the embedding and the head."""
    numbers = of_rule(method.matrices(WIDTH, B2), MATRICES)
    if method.embeddings is not None:
        numbers = numbers + of_rule(method.embeddings(WIDTH, B2), EMBEDDINGS)
    return numbers


def of_rule(tx: optax.GradientTransformation, shapes: Shapes) -> list[float]:
    """Of each leaf's updates at `SEEN` the size, and the cosine to the gradient."""
    params, grads = inputs(shapes)

    def step(state: Any, g: Any):
        update, state = tx.update(g, state, params)
        return state, update

    @jax.jit
    def updates(params: Any, grads: Any):
        return jax.lax.scan(step, tx.init(params), grads)[1]

    numbers = []
    for path, moved in jax.device_get(updates(params, grads)).items():
        for t in SEEN:
            u, g = np.float64(moved[t]), np.float64(grads[path][t])
            cosine = np.sum(u * g) / np.linalg.norm(u) / np.linalg.norm(g)
            size = np.sqrt(np.mean(u**2))
            numbers += [float(f"{size:.4g}"), round(float(cosine), 4)]
    return numbers


def tolerance(method: Method) -> float:
    """Ten times what rounding was seen to make of a fingerprint, or twice that where
    the state is rounded to 16 bits at every step."""
    params, _ = inputs(MATRICES)
    state = jax.eval_shape(method.matrices(WIDTH, B2).init, params)
    coarse = any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(state))
    return 5e-2 if coarse else 1e-3


def is_same(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Sizes are compared relatively, and cosines to a tenth of the tolerance."""
    return len(one) == len(other) and np.allclose(
        one, other, rtol=tolerance, atol=tolerance / 10
    )


def inputs(shapes: Shapes) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters, and gradients with the steps first.

    The columns of a gradient are in eight directions that stay, rows have five sizes,
    the first leaf has a tenth of the other's noise, and one gradient is 30 times as
    large as the others.
    """
    # NumPy promises the same numbers of RandomState in every version.
    draw = np.random.RandomState(0).standard_normal
    sizes = np.where(np.arange(STEPS) == SPIKE, 30.0, 1.0)[:, None, None]
    params, grads = {}, {}
    for k, path in enumerate(sorted(shapes)):
        p, q = shapes[path]
        left, right = draw((p, 8)) * 2.0 ** -np.arange(8), draw((STEPS, 8, q))
        rows = 2.0 ** -(np.arange(p) % 5)[:, None]
        noise = 0.1 ** (2 - k % 2) * draw((STEPS, p, q))
        params[path] = jnp.asarray(0.1 * draw((p, q)), jnp.float32)
        grads[path] = jnp.asarray(1e-2 * sizes * rows * (left @ right + noise), "f4")
    return params, grads
