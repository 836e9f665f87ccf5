"""Adam of one matrix."""

import jax.numpy as jnp

from lorapre_jax._methods import AlgorithmOne, RotatedRankOne, unbiased_decay


def adam(leaf, hyper, g, mu, nu):
    """-> update, new states of the two moments; also of a dense leaf, of any shape."""
    first, second = leaf.methods
    b1, b2, count, seed = (hyper[name] for name in ("b1", "b2", "count", "seed"))
    # What the moments have of one gradient.
    c1, c2 = (1 - unbiased_decay(b, count, g.dtype) for b in (b1, b2))

    def divided(m, root_v, share):
        if leaf.is_factored and not isinstance(second, AlgorithmOne):
            root_v = jnp.maximum(root_v, jnp.sqrt(c2) * share * jnp.abs(m))
        return m / (root_v + jnp.asarray(hyper["eps"], g.dtype))

    if isinstance(second, RotatedRankOne):
        mu, along, rest = first.split_moment(mu, g, b1, count, seed)
        (root_v, root_w), nu = second.rotated_moment(nu, g, along, rest, b2, count)
        update = mu.left @ divided(mu.right, root_v, c1).T
        update += first.complement_gain * divided(rest, root_w, 1)
    else:
        m, mu = first.first_moment(mu, g, b1, count, seed)
        root_v, nu = second.second_moment(nu, g, b2, count, seed)
        update = divided(m, root_v, c1)
    if leaf.is_factored:
        update = update * jnp.asarray(hyper["update_scale"], g.dtype)
    return update, mu, nu
