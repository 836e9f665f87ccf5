"""What the baselines share: a per-matrix update mapped over a tree of matrices."""

import jax
import jax.numpy as jnp


def check_matrices(params) -> None:
    """Raises ValueError, with its path, if a leaf is not a matrix."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) != 2:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name} has shape {jnp.shape(leaf)}, not a matrix.")


def map_matrices(update_one, updates, states, *rest):
    """`update_one(g, state, *rest) -> (update, state)` over the leaves of `updates`.

    `states` and `rest` have the structure of `updates`, with anything at its leaves.
    """
    leaves, tree = jax.tree.flatten(updates)
    others = map(tree.flatten_up_to, (states, *rest))
    pairs = [update_one(*leaf) for leaf in zip(leaves, *others, strict=True)]
    return tree.unflatten(u for u, _ in pairs), tree.unflatten(s for _, s in pairs)


def wide_shape(x) -> tuple[int, int]:
    """The shape of `x`, its smaller side first."""
    p, q = sorted(x.shape)
    return p, q


def oriented(update_one):
    """`update_one`, which sees tall matrices transposed, so that p <= q.

    What projects columns then projects the smaller side of every matrix.
    """

    def update(g, state, *rest):
        if g.shape[0] <= g.shape[1]:
            return update_one(g, state, *rest)
        direction, state = update_one(g.T, state, *rest)
        return direction.T, state

    return update


def projector_of(g, old, due):
    """The leading left singular vectors of `g` where `due`, else `old`, (p, r)."""

    def refresh(old):
        return jnp.linalg.svd(g, full_matrices=False)[0][:, : old.shape[1]]

    return jax.lax.cond(due, refresh, lambda old: old, old)


def adam_direction(g, mu, nu, count, b1, b2, eps):
    """Adam's bias-corrected direction at step `count` (from 1), new `mu`, new `nu`."""
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * jnp.square(g)
    t = count.astype(g.dtype)
    direction = (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    return direction, mu, nu


def random_projection(key, draw, shape):
    """The `draw`-th Gaussian `P` of a leaf's key, made anew wherever it is needed.

    Its variance is one over its rows, so that `P.T @ P` is the identity on average.
    """
    noise = jax.random.normal(jax.random.fold_in(key, draw), shape)
    return noise / jnp.sqrt(shape[0])
