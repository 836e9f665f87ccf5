"""Moving averages of numbers: weights, bias correction, roots of second moments."""

import jax.numpy as jnp

from lorapre_jax._numerics.norms import inverse_root, largest


def one(decay, count):
    """Returns one: the weight of all gradients in an average without bias."""
    del count
    return jnp.ones_like(decay)


def mass(decay, count):
    """Returns `1 - b^t`, the weight of all gradients in an average that began at 0."""
    return 1 - decay ** count.astype(decay.dtype)


def root_of_mass(decay, count):
    """Returns the factor by which the root of such an average is too small."""
    return jnp.sqrt(mass(decay, count))


def mass_of_root(decay, count):
    """Returns the weight of all gradients in such an average with decay `sqrt(b)`."""
    return mass(jnp.sqrt(decay), count)


def unbiased_decay(decay, count):
    """Returns hat b, the decay from one bias-corrected average to the next."""
    return decay * mass(decay, count - 1) / mass(decay, count)


def blend(decay, old, new):
    """Returns `sqrt(b old^2 + (1-b) new^2)`."""
    scale = largest(old, new)
    return scale * blend_squares(decay, old / scale, jnp.square(new / scale))


def blend_squares(decay, old, square):
    """Returns `sqrt(b old^2 + (1-b) square)` of numbers of at most about one."""
    total = decay * jnp.square(old) + (1 - decay) * square
    return total * inverse_root(total)
