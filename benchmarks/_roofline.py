"""What an update has to compute and to move, and how fast a machine can do both.

Operations are the multiplications and additions of the matrix products; all others are
a few for each entry. Bytes are those of the gradient and the state, read once, and of
the update and the new state, written once, in float32. No update with this state moves
fewer; ours reads the gradient several times, for each product of it needs the result of
the one before.

The rate of the machine is that of full float32 precision. Products of the gradient have
the default precision, which is lower and faster on most accelerators, so the share of
this rate that an update reaches is not bounded by one there.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FLOAT_BYTES = 4
NS_STEPS = 5
SIDE, COPIED = 4096, 512 * 2**20
"""Of the product, and bytes of the array, whose rates are measured."""
RUNS = 5


class Work(NamedTuple):
    operations: int
    bytes: int


class Rates(NamedTuple):
    """Per second."""

    operations: float
    bytes: float


def _subspace(p: int, q: int, r: int) -> int:
    """One step of subspace iteration (`online_regression.subspace`).

    g^T B, g V and g^T B' take 2 p q r each, and B (A V), A (B^T B') and what B' misses
    of B five products with an (r, r) matrix. The basis of the (p, r) columns has 5
    passes, each with a Gram matrix, a product with (r, r) and 4 steps of 3 products of
    (r, r) matrices; and a last Gram matrix.
    """
    small = 2 * r**2 * (3 * p + 2 * q)
    return 6 * p * q * r + small + 5 * (4 * p * r**2 + 4 * 6 * r**3) + 2 * p * r**2


def _residual_and_update(p: int, q: int, r: int) -> int:
    """One product of (p, 2r) and (2r, q), and B times a (q, r) matrix."""
    return 4 * p * q * r + 2 * p * q * r


def _newton_schulz(p: int, q: int) -> int:
    short, long = sorted((p, q))
    return NS_STEPS * (4 * short**2 * long + 2 * short**3)


def _newton_schulz_of_gram(p: int, q: int) -> int:
    """Ours where one side is four times the other: 4 products on the short side."""
    short, long = sorted((p, q))
    if long < 4 * short:
        return _newton_schulz(p, q)
    return 4 * short**2 * long + NS_STEPS * 8 * short**3


def _adam(p: int, q: int, r: int) -> Work:
    return Work(0, FLOAT_BYTES * 6 * p * q)


def _muon(p: int, q: int, r: int) -> Work:
    return Work(_newton_schulz(p, q), FLOAT_BYTES * 4 * p * q)


def _lorapre_adam(p: int, q: int, r: int) -> Work:
    operations = _subspace(p, q, r) + _residual_and_update(p, q, r)
    state = r * (p + q) + p + q + r
    return Work(operations, FLOAT_BYTES * (2 * p * q + 2 * state))


def _lorapre_muon(p: int, q: int, r: int) -> Work:
    """Nesterov's g^T B' is that of the subspace step: the compiler shares it."""
    operations = _subspace(p, q, r) + _residual_and_update(p, q, r)
    polar = _newton_schulz_of_gram(p, q) + _newton_schulz_of_gram(q, r)
    state = r * (p + q)
    return Work(operations + polar, FLOAT_BYTES * (2 * p * q + 2 * state))


_OF_MATRIX: dict[str, Callable[[int, int, int], Work]] = {
    "optax adam": _adam,
    "optax muon": _muon,
    "lorapre_adam, default": _lorapre_adam,
    "lorapre_muon": _lorapre_muon,
}


def work(transform: str, params: Mapping[str, Any], rank: int) -> Work | None:
    """Returns the sums over all matrices of the leaves `(layers, p, q)`.

    None if there is no formula for the transform, which has a name of `update_time`.
    """
    if transform not in _OF_MATRIX:
        return None
    found = []
    for layers, p, q in (leaf.shape for leaf in params.values()):
        of_matrix = _OF_MATRIX[transform](p, q, rank)
        found.append([layers * number for number in of_matrix])
    return Work(*map(sum, zip(*found, strict=True)))


def measured_rates(side: int = SIDE, copied: int = COPIED) -> Rates:
    """Returns the rates of a square product and of a copy, the medians of some runs."""

    # Random, since products of zeros are faster, and of a size that stays.
    x, y = jax.random.normal(jax.random.key(0), (2, side, side))
    y = y / side**0.5
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    # Negated, since a compiler may leave out a plain copy.
    negative = jax.jit(jnp.negative, donate_argnums=0)
    array = jnp.ones(copied // FLOAT_BYTES)
    return Rates(
        2 * side**3 / _seconds(lambda x: product(x, y), x, 2),
        2 * array.nbytes / _seconds(negative, array, 10),
    )


def _seconds(step: Callable[[jax.Array], jax.Array], x: jax.Array, queued: int):
    """Returns the time of one step, of some that are queued at once."""
    x, times = jax.block_until_ready(step(x)), []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(queued):
            x = step(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / queued)
    return statistics.median(times)
