"""Flora: Adafactor with a momentum that is kept in a random projection.

Hao et al., "Flora: Low-Rank Adapters Are Secretly Gradient Compressors" (2024), arXiv
2402.03293.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines import _matrices


class MomentumState(NamedTuple):
    count: jax.Array
    momentum: optax.Params  # (r, q), in the projection of a (p, q) matrix with p <= q.


def scale_by_flora(
    rank, b1=0.9, decay_rate=0.8, clipping_threshold=1.0, interval=1000, seed=0
) -> optax.GradientTransformation:
    """Adafactor, the paper's base optimizer, with momentum by Flora.

    The order of operations is that of the authors' code. Adafactor's factored second
    moment (`p + q` numbers) divides the gradient, Flora averages the quotients, and the
    average is clipped at the root mean square `clipping_threshold`. Adafactor's
    relative step (`optax.scale_by_param_block_rms`) belongs to the rate, and is the
    caller's. An update needs `params`, as it does for `optax.scale_by_factored_rms`.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=1),
        flora_momentum(rank, b1, interval, seed),
        optax.clip_by_block_rms(clipping_threshold),
    )


def flora_momentum(rank, b1=0.9, interval=1000, seed=0) -> optax.GradientTransformation:
    """Algorithm 2 of the paper: the moving average of `P @ g`, read as `P.T @ average`.

    The Gaussian `P` is drawn anew every `interval` steps (kappa in the paper). The
    average is then mapped to the full space by the old projection, and projected by the
    new one.
    """

    def init_fn(params):
        _matrices.check_matrices(params)

        def init_one(x):
            p, q = _matrices.wide_shape(x)
            return jnp.zeros((min(rank, p), q))

        return MomentumState(jnp.zeros([], jnp.int32), jax.tree.map(init_one, params))

    def update_fn(updates, state, params=None):
        del params
        draw = state.count // interval

        @_matrices.oriented
        def update_one(g, momentum, key):
            shape = len(momentum), len(g)
            projection = _matrices.random_projection(key, draw, shape)

            def transfer(momentum):
                before = _matrices.random_projection(key, draw - 1, shape)
                return projection @ (before.T @ momentum)

            momentum = jax.lax.cond(
                state.count % interval == 0, transfer, lambda old: old, momentum
            )
            momentum = b1 * momentum + (1 - b1) * (projection @ g)
            return projection.T @ momentum, momentum

        keys = optax.tree.split_key_like(jax.random.key(seed), updates)
        direction, momentum = _matrices.map_matrices(
            update_one, updates, state.momentum, keys
        )
        return direction, MomentumState(state.count + 1, momentum)

    return optax.GradientTransformation(init_fn, update_fn)
