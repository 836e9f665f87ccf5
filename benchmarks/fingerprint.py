"""A few numbers that describe what a method of the race computes.

Results are stored with them. They describe the updates of 20 steps on fixed small
gradients, to four digits. Another rule changes them; a new name, a comment or another
order of sums does not. They are not hashed, because another order of sums changes some
last digits, and would change a hash. So two fingerprints are compared with a tolerance.
Nothing that first happens after 20 steps is seen, such as a second projection.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.rules import B2, Method

STEPS = 20
SPIKE = 10
SEEN = (0, SPIKE + 1, STEPS - 1)
"""The steps whose updates count: the first, the one after the spike, the last."""
WIDTH = 128
"""The width of the smaller Llama of the race."""
MATRICES = {"layers/tall/kernel": (160, WIDTH), "layers/wide/kernel": (WIDTH, 160)}
EMBEDDINGS = {"embed/embedding": (160, WIDTH), "head/kernel": (WIDTH, 160)}
Shapes = Mapping[str, tuple[int, int]]
Look = Callable[[int], np.ndarray]


@functools.cache
def of(method: Method) -> list[float]:
    """Returns the numbers of the matrices, then those of embedding and head."""
    return [number for look in _looks(method) for number in _rounded(look)]


def of_rule(tx: optax.GradientTransformation, shapes: Shapes) -> list[float]:
    return _rounded(_looker(tx, shapes))


def tolerance(method: Method) -> float:
    """Returns three times the change from gradients that differ in their last bit.

    It is 1e-3 at least. It is more if rounding is not small, as with factors of 16
    bits, or decides the signs of small numbers, as in MLorc.
    """
    apart = [1e-3 / 3]
    for look in _looks(method):
        exact = look(0)
        for seed in (1, 2, 3):
            apart.append(np.max(np.abs(look(seed) - exact) / (np.abs(exact) + 0.1)))
    return float(f"{3 * max(apart):.1g}")


@functools.cache
def _looks(method: Method) -> list[Look]:
    found = [_looker(method.matrices(WIDTH, B2), MATRICES)]
    if method.embeddings is not None:
        found.append(_looker(method.embeddings(WIDTH, B2), EMBEDDINGS))
    return found


def _looker(tx: optax.GradientTransformation, shapes: Shapes) -> Look:
    """Returns a function from a seed to the numbers of each leaf at `SEEN`.

    These are the size of the update, and its cosine to the gradient, or 0 if there is
    no update. With seed 0 the gradients are exact; other seeds change their last bits.
    """
    params, exact = inputs(shapes)

    def step(state: Any, g: Any):
        update, state = tx.update(g, state, params)
        return state, update

    # So that an accelerator, whose default precision is lower, has a CPU's numbers.
    @jax.default_matmul_precision("highest")
    @jax.jit
    def updates(params: Any, grads: Any):
        return jax.lax.scan(step, tx.init(params), grads)[1]

    def look(seed: int) -> np.ndarray:
        draw = np.random.RandomState(seed).standard_normal
        bit = 1e-7 if seed else 0.0
        grads = {k: g * np.float32(1 + bit * draw(g.shape)) for k, g in exact.items()}
        numbers = []
        for path, moved in jax.device_get(updates(params, grads)).items():
            for t in SEEN:
                u, g = np.float64(moved[t]), np.float64(exact[path][t])
                norms = np.linalg.norm(u) * np.linalg.norm(g)
                cosine = np.sum(u * g) / norms if norms else 0.0
                numbers += [np.sqrt(np.mean(u**2)), cosine]
        return np.asarray(numbers)

    return look


def _rounded(look: Look) -> list[float]:
    """Returns sizes to four digits, and cosines to four decimals."""
    numbers: list[float] = []
    for size, cosine in look(0).reshape(-1, 2).tolist():
        numbers += [float(f"{size:.4g}"), round(cosine, 4)]
    return numbers


def is_same(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether all numbers agree, with the tolerance relative to their size plus 0.1."""
    return len(one) == len(other) and np.allclose(
        one, other, rtol=tolerance, atol=tolerance / 10
    )


def inputs(shapes: Shapes) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns parameters, and gradients with the steps as the first axis.

    The columns of all gradients are near one space of eight dimensions. Rows have five
    sizes, the first leaf has a tenth of the other's noise, and one gradient is 30 times
    as large as the others.
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
