"""Newton-Schulz orthogonalisation of one matrix, Muon's preconditioner."""

from typing import Any

import jax
import numpy as np

Coefficients = tuple[float, float, float] | tuple[tuple[float, float, float], ...]

# Quintic with the steepest slope at zero that still keeps singular values near one
# (Jordan et al., 2024).
NS_COEFFS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def orthogonalize(x: jax.Array, coefficients: Coefficients, steps: int) -> jax.Array:
    """The nearest (semi-)orthogonal matrix to `x: (p, q)`, approximately.

    Iterates `X <- a X + (b G + c G^2) X`, `G = X X^T`, on the shorter side. Singular
    values end in about [0.7, 1.2], those below `a^-steps` nearer to zero.

    Args:
      x: The matrix, of spectral norm at most one; see `norms.divide_by_norm`.
      coefficients: `(a, b, c)`, or one triple per step, of which the last `steps` run.
      steps: Number of iterations.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T, coefficients, steps).T
    for a, b, c in _per_step(coefficients, steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _per_step(coefficients: Any, steps: int) -> tuple[tuple[float, float, float], ...]:
    if np.ndim(coefficients) == 1:
        return (coefficients,) * steps
    return coefficients[len(coefficients) - steps :]
