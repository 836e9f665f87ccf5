"""One run: steps at one peak rate, then the cross-entropy on both splits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.architectures.data import Images, batch_of, perturbed
from benchmarks.architectures.models import Architecture, Params
from benchmarks.architectures.optimizers import optimizer

BATCH, WARMUP, DRAWS = 32, 0.1, 4


class Losses(NamedTuple):
    """Final mean cross-entropy in nats, over `DRAWS` perturbations of each image."""

    training: float
    held_out: float


# (training images, held-out images, rate, dense rate, seed) -> Losses
Run = Callable[[Images, Images, float, float, int], Losses]


def make_run(architecture: Architecture, rule: str, steps: int) -> Run:
    """Returns a run of `rule` for the matrices, with AdamW for all other leaves.

    Runs that share a seed share the initial parameters and every batch. The run is
    compiled once for all rates and seeds. Steps are a Python loop, since XLA's CPU
    backend runs the gradients of convolutions up to thirty times slower inside a
    `lax.scan`.
    """

    def transform(rates: Any) -> optax.GradientTransformationExtraArgs:
        rates = [schedule(peak, steps) for peak in rates]
        return optimizer(architecture, rule, *rates)

    @jax.jit
    def step(params: Params, state: Any, images: Images, key: jax.Array, rates: Any):
        batch = batch_of(key, images, BATCH)
        grads = jax.grad(loss, argnums=1)(architecture, params, batch)
        updates, state = transform(rates).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    init_state = jax.jit(lambda params, rates: transform(rates).init(params))

    def run(training, held_out, rate, dense_rate, seed) -> Losses:
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        rates = float(rate), float(dense_rate)
        params = architecture.init(init_key)
        state = init_state(params, rates)
        for key in jax.random.split(batch_key, steps):
            params, state = step(params, state, training, key, rates)
        return Losses(
            *(float(final(architecture, params, x)) for x in (training, held_out))
        )

    return run


def loss(architecture: Architecture, params: Params, images: Images) -> jax.Array:
    logits = architecture.apply(params, images.pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()


@partial(jax.jit, static_argnums=0)
def final(architecture: Architecture, params: Params, images: Images) -> jax.Array:
    draws = jax.random.split(jax.random.key(0), DRAWS)
    several = [perturbed(key, images) for key in draws]
    return loss(
        architecture, params, jax.tree.map(lambda *x: jnp.concatenate(x), *several)
    )


def schedule(peak: Any, steps: int) -> optax.Schedule:
    """Returns a linear warm-up and a cosine to zero; the first rate is not zero."""
    rise = max(1, round(WARMUP * steps))

    def rate(count: Any) -> jax.Array:
        t = jnp.asarray(count, jnp.float32) + 1
        cosine = 0.5 + 0.5 * jnp.cos(jnp.pi * (t - rise) / (steps - rise + 1))
        return peak * jnp.where(t < rise, t / rise, cosine)

    return rate
