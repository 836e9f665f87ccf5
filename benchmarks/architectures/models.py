"""Two small networks that are not transformers, as pure functions.

    images (b, 8, 8, 1) -> logits (b, 10)

The stem and the head stay dense, as a Llama's embedding and head do.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

import lorapre_jax as lp

CLASSES = 10
Params = dict[str, Any]


def _mlp(inner: nnx.Linear, outer: nnx.Linear, x: jax.Array) -> jax.Array:
    # Plain matrices are twice as fast in the backward pass on CPUs.
    rows = x.reshape(-1, x.shape[-1])
    return outer(nnx.gelu(inner(rows))).reshape(x.shape)


class MixerBlock(nnx.Module):
    """Pre-norm mixing across the tokens, then across the channels, of (b, t, d)."""

    def __init__(self, tokens: int, width: int, *, rngs: nnx.Rngs):
        self.token_norm = nnx.LayerNorm(width, rngs=rngs)
        self.token_in = nnx.Linear(tokens, 4 * tokens, rngs=rngs)
        self.token_out = nnx.Linear(4 * tokens, tokens, rngs=rngs)
        self.channel_norm = nnx.LayerNorm(width, rngs=rngs)
        self.channel_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.channel_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.token_norm(x).swapaxes(1, 2)
        x = x + _mlp(self.token_in, self.token_out, y).swapaxes(1, 2)
        return x + _mlp(self.channel_in, self.channel_out, self.channel_norm(x))


class Mixer(nnx.Module):
    """MLP-Mixer (Tolstikhin et al., 2021) on 2x2 patches; its blocks are stacked."""

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (2, 2), strides=2, rngs=rngs)
        make_blocks = nnx.vmap(lambda rngs: MixerBlock(16, width, rngs=rngs))
        self.blocks = make_blocks(rngs.split(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        scan = nnx.scan(
            lambda x, block: block(x),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            unroll=True,
        )
        return self.head(self.norm(scan(x, self.blocks)).mean(axis=1))


class ConvNet(nnx.Module):
    """A stem and four 3x3 convolutions, each normalised over its channels."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        strides = (2, 1, 2, 1)  # 8x8 -> 4x4 -> 4x4 -> 2x2 -> 2x2
        make = lambda stride: nnx.Conv(width, width, (3, 3), stride, rngs=rngs)  # noqa: E731
        self.convs = nnx.List([make(stride) for stride in strides])
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in strides])
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(images))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, and which of its leaves are matrices.

    Attributes:
      make: The module, from `nnx.Rngs`.
      matrices: A regular expression on leaf paths.
      axes: The matrix axes of these leaves.
    """

    make: Callable[[nnx.Rngs], Any]
    matrices: str
    axes: lp.MatrixAxes

    @partial(jax.jit, static_argnums=0)
    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(params=key))))

    def apply(self, params: Params, images: jax.Array) -> jax.Array:
        """Logits (b, 10) of images (b, 8, 8, 1)."""
        abstract = nnx.eval_shape(lambda: self.make(nnx.Rngs(params=0)))
        return nnx.merge(nnx.graphdef(abstract), params)(images)


def mixer(width: int = 64, depth: int = 4) -> Architecture:
    return Architecture(
        lambda rngs: Mixer(width, depth, rngs=rngs),
        r"^blocks/\w+/kernel$",
        lp.MatrixAxes(rows=-2, columns=-1),  # Blocks are a batch axis.
    )


def convnet(width: int = 64) -> Architecture:
    return Architecture(
        lambda rngs: ConvNet(width, rngs=rngs),
        r"^convs/\d+/kernel$",
        lp.MatrixAxes(rows=(0, 1, 2), columns=3),
    )


ARCHITECTURES = {"mixer": mixer(), "convnet": convnet()}
