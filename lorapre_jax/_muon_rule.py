"""Muon of one matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorapre_jax._methods import LowRank, mass
from lorapre_jax._online_regression import hypot
from lorapre_jax._orthogonalize import (
    Coefficients,
    divided,
    frobenius_norm,
    orthogonalize,
)


class MuonRule(NamedTuple):
    """`whole`, or in two parts around the costly orthogonalisation, `polar`."""

    nesterov: bool
    ns_steps: int
    ns_coeffs: Coefficients

    def whole(self, leaf, hyper, g, mu):
        rest, mu = self.begin(leaf, hyper, g, mu)
        return self.finish(leaf, hyper, g, mu, self.polar(rest))[:2]

    def begin(self, leaf, hyper, g, mu):
        """What is orthogonalised at its full size, over its norm; the new momentum."""
        method, step = leaf.methods[0], (hyper["count"], hyper["seed"])
        beta = jnp.asarray(hyper["beta"], g.dtype)
        if isinstance(method, LowRank):
            mu, _, residual = method.split_moment(mu, g, beta, *step)
            residual = _share_of_noise(beta, hyper["count"]) * residual
            norm = hypot(frobenius_norm(mu.right), frobenius_norm(residual))
            return divided(residual, norm, hyper["eps"]), mu
        m, mu = method.first_moment(mu, g, beta, *step)
        m = self.look_ahead(hyper, m, g)
        return divided(m, frobenius_norm(m), hyper["eps"]), mu

    def finish(self, leaf, hyper, g, mu, orthogonal):
        """The update from what `begin` gave, orthogonalised; momentum; that again."""
        update = orthogonal
        if isinstance(leaf.methods[0], LowRank):
            beta = jnp.asarray(hyper["beta"], g.dtype)
            gain = leaf.methods[0].complement_gain
            gain = gain / _share_of_noise(beta, hyper["count"])
            # The left factor is orthonormal, where `right` is not rounding alone: it
            # stays outside.
            right = self.look_ahead(hyper, mu.right, g.T @ mu.left)
            right = divided(right, frobenius_norm(right), hyper["eps"])
            update = mu.left @ self.polar(right).T + gain * orthogonal
        scale = _shape_scale(g.shape, hyper["consistent_rms"], g.dtype)
        if leaf.is_factored:
            scale = scale * jnp.asarray(hyper["update_scale"], g.dtype)
        return update * scale, mu, orthogonal

    def polar(self, x):
        return orthogonalize(x, self.ns_coeffs, self.ns_steps)

    def look_ahead(self, hyper, m, g):
        """The bias-corrected average as `optax.contrib.muon` looks ahead."""
        if not self.nesterov:
            return m
        b, count = jnp.asarray(hyper["beta"], g.dtype), hyper["count"]
        now, ahead = mass(b, count), mass(b, optax.safe_increment(count))
        return b * (now / ahead) * m + ((1 - b) / now) * g


def _share_of_noise(beta, count):
    """What the corrected average of `count` steps leaves of uncorrelated noise."""
    total = mass(beta, count)
    return jnp.sqrt((1 - beta) / (1 + beta) * (2 - total) / total)


def _shape_scale(shape: tuple[int, ...], consistent_rms, dtype) -> jax.Array:
    p, q = shape
    if consistent_rms is None:
        return jnp.sqrt(jnp.asarray(max(1.0, q / p), dtype))
    return jnp.sqrt(jnp.asarray(max(p, q), dtype)) * jnp.asarray(consistent_rms, dtype)
