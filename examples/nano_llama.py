"""Trains a small Llama twice, with AdamW and with low-rank moments, and draws both.

    python -m examples.nano_llama    # about three minutes on two CPU cores

One file to read from top to bottom and to change: text, model, optimizers, training,
picture. The text is on your machine already: the source code of Python's standard
library, one token per byte. Both runs start from the same weights and see the same
batches in the same order, at the same learning rate; their loss is measured on files
that neither has seen. This is one seed; `benchmarks/quality` has three, and more
optimizers. The trainer with checkpoints, meshes and tokenizers is `examples/llama`.

Shapes in comments use

    b batch   s sequence   d width   f ffn_width   h heads   e = d / h   v vocabulary
"""

import dataclasses
import hashlib
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import lorapre_jax as lp

VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole experiment. A million parameters, about a million tokens."""

    width: int = 128
    ffn_width: int = 384
    num_heads: int = 4
    num_layers: int = 4

    batch_size: int = 16
    seq_len: int = 128
    steps: int = 500
    held_out_rows: int = 128
    eval_every: int = 50
    seed: int = 0

    # One rate for both: AdamW is worse here at half of it and at twice it.
    # lorapre_adamw is better still at a higher one: try 4e-3.
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    rank: int = 16  # an eighth of the width


# ------------------------------------------------------------------------------- text


class Text(NamedTuple):
    train: jax.Array  # (bytes,) uint8
    held_out: jax.Array  # (bytes,) uint8


def read_text(folder: str | Path | None = None) -> Text:
    """All Python sources below `folder`, the standard library by default.

    One file in 25 is held out. The order is that of the files' hashes, so that each
    part is a mixture, and files with the same content count once.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    sources = {
        path.read_bytes()
        for path in root.rglob("*.py")
        if skipped.isdisjoint(path.relative_to(root).parts)
    }
    files = sorted(sources, key=lambda source: hashlib.sha256(source).digest())

    def joined(files: list[bytes]) -> jax.Array:
        return jnp.asarray(np.frombuffer(b"\0".join(files), np.uint8))

    count = len(files) // 25
    text = Text(joined(files[count:]), joined(files[:count]))
    if min(map(len, text)) < 10_000:
        raise ValueError(
            f"{root}: too few Python sources to learn from; give `read_text` a folder "
            "that has more"
        )
    return text


def sample(text: jax.Array, key: jax.Array, rows: int, length: int) -> jax.Array:
    """Stretches of the text from random places on, (rows, length) int32."""
    starts = jax.random.randint(key, (rows, 1), 0, len(text) - length + 1)
    return text[starts + jnp.arange(length)].astype(jnp.int32)


# ------------------------------------------------------------------------------ model


def linear(fan_in: int, fan_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_init=init, rngs=rngs)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: turns feature pairs (i, i + e/2) of (b, s, h, e)."""
    length, head_dim = x.shape[1], x.shape[3]
    frequencies = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = jnp.arange(length)[:, None, None] * frequencies  # (s, 1, e/2)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        d = config.width
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (linear(d, d, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:  # (b, s, d)
        def heads(y: jax.Array) -> jax.Array:  # (b, s, h, e)
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q, k, v = rotate(heads(self.q(x))), rotate(heads(self.k(x))), heads(self.v(x))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        d, f = config.width, config.ffn_width
        self.gate, self.up = linear(d, f, rngs), linear(d, f, rngs)
        self.down = linear(f, d, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Tokens (b, s) to logits (b, s, v)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        d = config.width
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(VOCABULARY, d, embedding_init=init, rngs=rngs)
        # All blocks in one, each parameter with a leading axis of layers. They compile
        # once, and so does the optimizer's update of them.
        make_blocks = nnx.vmap(lambda rngs: Block(config, rngs))
        self.layers = make_blocks(rngs.split(config.num_layers))
        self.norm = nnx.RMSNorm(d, rngs=rngs)
        self.head = linear(d, VOCABULARY, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return block(x)

        return self.head(self.norm(through(self.embed(tokens), self.layers)))


# ------------------------------------------------------------------------- optimizers


def make_optimizers(config: Config) -> dict[str, optax.GradientTransformation]:
    """AdamW and ours, by name. All that differs is how the two moments are kept."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    clip, decay = optax.clip_by_global_norm(1.0), config.weight_decay
    adamw = optax.adamw(rate, b2=0.95, weight_decay=decay)
    ours = lp.lorapre_adamw(rate, config.rank, b2=0.95, weight_decay=decay)
    return {
        "AdamW": optax.chain(clip, adamw),
        "lorapre_adamw": optax.chain(clip, ours),
    }


# --------------------------------------------------------------------------- training


class Run(NamedTuple):
    """What there is to draw of one optimizer."""

    steps: list[int]
    losses: list[float]  # held out, in nats per byte
    state_bytes: int


def next_token_loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """Mean over all positions of (b, s + 1) but the first."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        model(tokens[:, :-1]), tokens[:, 1:]
    )
    return losses.mean()


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(next_token_loss)(model, tokens)
    optimizer.update(model, grads)
    return loss


evaluate = nnx.jit(next_token_loss)


def train(tx: optax.GradientTransformation, text: Text, config: Config) -> Run:
    model = Llama(config, nnx.Rngs(config.seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(optimizer.opt_state))

    length = config.seq_len + 1  # the targets are the tokens one place on
    key, held_out_key = jax.random.split(jax.random.key(config.seed))
    held_out = sample(text.held_out, held_out_key, config.held_out_rows, length)
    run, start = Run([], [], state_bytes), time.perf_counter()
    for step in range(config.steps + 1):
        if step % config.eval_every == 0 or step == config.steps:
            run.steps.append(step)
            run.losses.append(float(evaluate(model, held_out)))
            seconds = time.perf_counter() - start
            print(f"  step {step:4}  loss {run.losses[-1]:.3f}  {seconds:3.0f} s")
        if step < config.steps:
            step_key = jax.random.fold_in(key, step)
            tokens = sample(text.train, step_key, config.batch_size, length)
            train_step(model, optimizer, tokens)
    return run


# ---------------------------------------------------------------------------- picture


def draw(runs: dict[str, Run], path: Path) -> None:
    """Loss while training on the left, size of the optimizer state on the right."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(5, 2))
    for (name, run), color in zip(runs.items(), ("0.5", "tab:blue"), strict=True):
        # The first loss, of random weights, would leave no room for the difference.
        label = f"{name}: {run.losses[-1]:.3f}"
        curves.plot(run.steps[1:], run.losses[1:], "o-", ms=3, color=color, label=label)
        bar = bars.bar(name, run.state_bytes, color=color)
        bars.bar_label(bar, fmt=EngFormatter("B", places=1))
    curves.set(xlabel="step", title="held-out loss (nats per byte)")
    curves.grid(alpha=0.3)
    curves.legend()
    curves.spines[["top", "right"]].set_visible(False)
    bars.set(title="optimizer state", yticks=[])
    bars.spines[["left", "top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(config: Config, path: Path) -> dict[str, Run]:
    text = read_text()
    print(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out")
    runs = {}
    for name, tx in make_optimizers(config).items():
        print(name)
        runs[name] = train(tx, text, config)
    print(f"\n{'':16}{'held-out loss':>15}{'optimizer state':>23}")
    for name, run in runs.items():
        print(f"{name:16}{run.losses[-1]:15.3f}{run.state_bytes:17,} bytes")
    draw(runs, path)
    print(f"\nThe curves: {path}")
    return runs


if __name__ == "__main__":
    main(Config(), Path("runs/nano_llama.png"))
