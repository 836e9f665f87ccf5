"""Functions of several baselines, such as mapping an update over matrices."""

import jax
import jax.numpy as jnp
import optax


def check_matrices(params) -> None:
    """Raises ValueError, with its path, if a leaf is not a matrix."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.ndim(leaf) != 2:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name} has shape {jnp.shape(leaf)}, not a matrix.")


def stateless(direction_of) -> optax.GradientTransformation:
    """Returns the transform that maps `direction_of(g)` over matrices."""

    def init_fn(params):
        check_matrices(params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        return jax.tree.map(direction_of, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def map_matrices(update_one, updates, states, *trees):
    """Maps `update_one(g, state, *others) -> (update, state)` over matrices.

    `states` and `trees` have the structure of `updates`, with anything at its leaves.
    """
    leaves, tree = jax.tree.flatten(updates)
    others = map(tree.flatten_up_to, (states, *trees))
    pairs = [update_one(*leaf) for leaf in zip(leaves, *others, strict=True)]
    return tree.unflatten(u for u, _ in pairs), tree.unflatten(s for _, s in pairs)


def wide_shape(x) -> tuple[int, int]:
    """Returns the shape of `x` with its smaller side first."""
    p, q = sorted(x.shape)
    return p, q


def oriented(update_one):
    """Returns `update_one` for matrices of any shape; it sees p <= q.

    Tall matrices are transposed, so that a projection of columns is one of the smaller
    side of every matrix.
    """

    def update(g, state, *others):
        if g.shape[0] <= g.shape[1]:
            return update_one(g, state, *others)
        direction, state = update_one(g.T, state, *others)
        return direction.T, state

    return update


def projector_of(g, old, due):
    """Returns the leading left singular vectors of `g` if `due`, else `old`, (p, r)."""

    def refresh(old):
        return jnp.linalg.svd(g, full_matrices=False)[0][:, : old.shape[1]]

    return jax.lax.cond(due, refresh, lambda old: old, old)


def adam_direction(g, mu, nu, count, b1, b2, eps):
    """Returns Adam's direction at step `count` (from 1), and the new `mu` and `nu`."""
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * jnp.square(g)
    t = count.astype(g.dtype)
    direction = (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    return direction, mu, nu


def random_projection(key, draw, shape):
    """Returns the `draw`-th Gaussian matrix of a leaf's key, which is not stored.

    Its variance is one over its number of rows p, so that the mean of `P.T @ P` is the
    identity.
    """
    noise = jax.random.normal(jax.random.fold_in(key, draw), shape)
    return noise / jnp.sqrt(shape[0])
