"""scikit-learn's digits, made harder: shifted by up to a pixel, in noise.

All clean digits are soon classified correctly, and then do not distinguish optimizers.
Every image that a network sees, in training and in evaluation, is shifted at random by
-1, 0 or 1 pixels along each axis and has normal noise added. Training never sees the
same image twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

NOISE = 0.25  # Standard deviation; pixels without it are in [-0.5, 0.5].
TRAIN, VALIDATION = 1097, 300  # The other 400 images are the test split.


class Images(NamedTuple):
    pixels: jax.Array  # (n, 8, 8, 1)
    labels: jax.Array  # (n,)


@functools.cache
def digits() -> dict[str, Images]:
    """Returns the splits "train", "validation" and "test", always the same."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = jnp.asarray(pixels[order].reshape(-1, 8, 8, 1) / 16 - 0.5, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    edges = [0, TRAIN, TRAIN + VALIDATION, len(labels)]
    return {
        name: Images(pixels[start:stop], labels[start:stop])
        for name, start, stop in zip(
            ("train", "validation", "test"), edges[:-1], edges[1:], strict=True
        )
    }


def perturbed(key: jax.Array, images: Images) -> Images:
    """Shifts each image, with blank pixels at the border, and adds noise to it."""
    shift_key, noise_key = jax.random.split(key)
    n, height, width, _ = images.pixels.shape
    starts = jax.random.randint(shift_key, (n, 2), 0, 3)
    border = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(images.pixels, border, constant_values=-0.5)
    crop = lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), (height, width, 1))  # noqa: E731
    pixels = jax.vmap(crop)(padded, starts)
    noise = NOISE * jax.random.normal(noise_key, pixels.shape)
    return Images(pixels + noise, images.labels)


def batch_of(key: jax.Array, images: Images, size: int) -> Images:
    """Returns perturbed images that are drawn with replacement."""
    pick_key, key = jax.random.split(key)
    picked = jax.random.randint(pick_key, (size,), 0, len(images.labels))
    return perturbed(key, Images(images.pixels[picked], images.labels[picked]))
