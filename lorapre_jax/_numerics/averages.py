"""Moving averages of numbers: weights, bias correction, roots of second moments."""

import jax.numpy as jnp

from lorapre_jax._numerics.norms import inverse_root, largest


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
    scale = largest(old, new)
    return scale * blend_squares(decay, old / scale, jnp.square(new / scale))


def blend_squares(decay, old, square):
    """`sqrt(b old^2 + (1-b) square)`, of numbers of about one; zero stays zero."""
    total = decay * jnp.square(old) + (1 - decay) * square
    return total * inverse_root(total)
