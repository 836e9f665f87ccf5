"""Moving averages of numbers: weights, bias correction, roots of second moments."""

import jax.numpy as jnp

from lorapre_jax._numerics.norms import hypot, root


def one(decay, count):
    """The total weight of gradients in an average that is bias-corrected already."""
    del count
    return jnp.ones_like(decay)


def mass(decay, count):
    """`1 - b^t`: the total weight of an average that started from zero."""
    return 1 - decay ** count.astype(decay.dtype)


def root_of_mass(decay, count):
    """What the root of such an average is too small by."""
    return jnp.sqrt(mass(decay, count))


def mass_of_root(decay, count):
    """The weight of an average with decay `sqrt(b)`."""
    return mass(jnp.sqrt(decay), count)


def unbiased_decay(decay, count, dtype):
    """The decay that turns one bias-corrected average into the next."""
    decay = jnp.asarray(decay, dtype)
    return decay * mass(decay, count - 1) / mass(decay, count)


def blend(decay, old, new):
    """`sqrt(b old^2 + (1-b) new^2)`."""
    return hypot(root(decay) * old, root(1 - decay) * new)
