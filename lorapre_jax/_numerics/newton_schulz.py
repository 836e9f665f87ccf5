"""Newton-Schulz orthogonalisation of one matrix, Muon's preconditioner."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorapre_jax._numerics.arrays import dot

Coefficients = tuple[float, float, float] | tuple[tuple[float, float, float], ...]

# Quintic with the steepest slope at zero that still keeps singular values near one
# (Jordan et al., 2024).
NS_COEFFS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5

# How many times longer than the other a side is, as of a factor, where the iteration is
# on the Gram matrix. It is cheaper from 1.5 on where full precision costs no more.
_LONG = 4


def orthogonalize(x: jax.Array, coefficients: Coefficients, steps: int) -> jax.Array:
    """Returns approximately the nearest (semi-)orthogonal matrix to `x: (p, q)`.

    It iterates `X <- F X` with `F = a I + b G + c G^2` and `G = X X^T` on the shorter
    side. Singular values end in about [0.7, 1.2], and those below `a^-steps` nearer to
    zero. If one side is long, it iterates `G <- F G F` and applies the product of all F
    at the end. That is done in full precision, since eigenvalues of G that rounding
    makes negative would grow.

    Args:
      x: The matrix, of spectral norm at most one; see `norms.divide_by_norm`.
      coefficients: `(a, b, c)`, or one triple per step, of which the last `steps` run.
      steps: Number of iterations.
    """
    p, q = x.shape
    if p > q:
        return orthogonalize(x.T, coefficients, steps).T
    if q >= _LONG * p:
        return dot(_product_of_factors(x, coefficients, steps), x)
    # Written out, for loops of several leaves would run one after the other.
    for each in _per_step(coefficients, steps):
        x = _step(x, *each)
    return x


@jax.jit  # So that all steps are traced once.
def _step(x, a, b, c):
    gram = x @ x.T
    return a * x + (b * gram + c * (gram @ gram)) @ x


def _product_of_factors(x, coefficients: Coefficients, steps: int) -> jax.Array:
    """Returns the product of all F, which needs the Gram matrix only."""
    gram = dot(x, x.T)
    total = jnp.eye(len(x), dtype=x.dtype)
    for each in _per_step(coefficients, steps):
        gram, total = _gram_step(gram, total, *each)
    return total


@jax.jit
def _gram_step(gram, total, a, b, c):
    rest = b * gram + c * dot(gram, gram)  # F = a I + rest
    once = a * gram + dot(rest, gram)
    return a * once + dot(once, rest), a * total + dot(rest, total)


def _per_step(coefficients: Any, steps: int) -> tuple[tuple[float, float, float], ...]:
    if np.ndim(coefficients) == 1:
        return (coefficients,) * steps
    return coefficients[len(coefficients) - steps :]
