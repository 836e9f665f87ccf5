"""Adam of one matrix."""

import jax.numpy as jnp

from lorapre_jax._methods import AlgorithmOne, RotatedRankOne, unbiased_decay


def adam(leaf, hyper, g, mu, nu):
    """-> update, new states of the two moments; also of a dense leaf, of any shape."""
    first, second = leaf.methods
    b1, b2, count = hyper["b1"], hyper["b2"], hyper["count"]
    bounded = leaf.is_factored and not isinstance(second, AlgorithmOne)

    def divided(m, root_v):
        if bounded:
            c1, c2 = (1 - unbiased_decay(b, count, g.dtype) for b in (b1, b2))
            root_v = jnp.maximum(root_v, jnp.sqrt(c2) * c1 * jnp.abs(m))
        return m / (root_v + jnp.asarray(hyper["eps"], g.dtype))

    if isinstance(second, RotatedRankOne):
        mu, residual = first.split_moment(mu, g, b1, count, hyper["seed"])
        (along, across), nu = second.rotated_moment(nu, mu.left, residual, g, b2, count)
        update = mu.left @ divided(mu.right, along)
        update += first.complement_gain * divided(residual, across)
    else:
        m, mu = first.first_moment(mu, g, b1, count, hyper["seed"])
        root_v, nu = second.second_moment(nu, g, b2, count, hyper["seed"])
        update = divided(m, root_v)
    if leaf.is_factored:
        update = update * jnp.asarray(hyper["update_scale"], g.dtype)
    return update, mu, nu
