"""Generates tokens after prompts with a trained model."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.cache import Cache
from examples.llama.pure import Params, PureLlama


def generate(
    model: PureLlama,
    params: Params,
    prompts: Sequence[Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    end_of_text: tuple[int, ...] = (),
) -> list[np.ndarray]:
    """Returns the tokens after each prompt, (length,) int32, without the prompt.

    The rows are computed together and end one by one: at an ``end_of_text``, which is
    left out, or after ``max_new_tokens``. The same arguments give the same tokens. The
    tokens of a row do not depend on the other rows, except by rounding and, with a
    temperature, by the row's place among them.

    Args:
      prompts: Of one token or more each, of any lengths.
      temperature: 0 takes the likeliest token; 1 draws by the model's probabilities.
      top_p: Draw only among the fewest tokens whose probabilities reach this.
      key: Needed with a temperature.
    """
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    _check(rows, model.vocab_size, max_new_tokens, temperature, top_p, key)
    longest = max(map(len, rows))
    begin = np.asarray([longest - len(row) for row in rows], np.int32)
    padded = np.stack(
        [np.pad(row, (first, 0)) for row, first in zip(rows, begin, strict=True)]
    )
    key = jax.random.key(0) if key is None else key
    sampling = Sampling(temperature, top_p)
    keys = jax.random.split(key, len(rows))
    made, lengths = jax.device_get(
        _generate(
            model, max_new_tokens, sampling, end_of_text, params, padded, begin, keys
        )
    )
    return [row[:length] for row, length in zip(made, lengths, strict=True)]


def _check(
    rows: Sequence[np.ndarray],
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: jax.Array | None,
) -> None:
    if not rows:
        raise ValueError("there is no prompt")
    for number, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(
                f"prompt {number} is of shape {row.shape}; it must be a list of one "
                "token or more (the end of text begins a new document)"
            )
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"prompt {number} has tokens from {row.min()} to {row.max()}; the "
                f"model knows 0 to {vocab_size - 1}"
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a number above, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature > 0 and key is None:
        raise ValueError("a temperature draws at random: give a key")


class Sampling(NamedTuple):
    temperature: float
    top_p: float


class _Progress(NamedTuple):
    made: jax.Array  # (b, n) int32
    count: jax.Array  # () int32, columns of it that are
    running: jax.Array  # (b,) bool
    lengths: jax.Array  # (b,) int32, what counts of each row
    cache: Cache


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: PureLlama,
    max_new_tokens: int,
    sampling: Sampling,
    end_of_text: tuple[int, ...],
    params: Params,
    prompts: jax.Array,
    begin: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns tokens (b, n) and how many of each row count.

    The prompts (b, s) end together and begin at ``begin`` (b,).
    """
    batch, length = prompts.shape

    def extended(now: _Progress, tokens: jax.Array) -> _Progress:
        """Returns ``tokens`` (b, s) with one more column."""
        logits, cache = model.extend(params, tokens, now.cache)
        chosen = choose(logits, _folded(keys, now.count), sampling)
        ended = jnp.isin(chosen, jnp.asarray(end_of_text, jnp.int32))
        running = now.running & ~ended
        made = now.made.at[:, now.count].set(chosen)
        return _Progress(made, now.count + 1, running, now.lengths + running, cache)

    def goes_on(now: _Progress) -> jax.Array:
        return (now.count < max_new_tokens) & now.running.any()

    nothing = _Progress(
        made=jnp.zeros((batch, max_new_tokens), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        running=jnp.ones(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        cache=model.empty_cache(begin, length + max_new_tokens - 1),
    )
    end = jax.lax.while_loop(
        goes_on,
        lambda now: extended(now, now.made[:, now.count - 1, None]),
        extended(nothing, prompts),
    )
    return end.made, end.lengths


_folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns a token (b,) int32 for each row of ``logits`` (b, v), with its key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = jnp.where(nucleus(logits, sampling.top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Returns (b, v) bool: the fewest tokens whose probabilities reach ``top_p``.

    Of equally likely tokens, it takes the first.
    """
    order = jnp.argsort(-logits, axis=-1)
    likeliest_first = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    reached = jnp.cumsum(likeliest_first, axis=-1)
    before = jnp.pad(reached[:, :-1], ((0, 0), (1, 0)))
    return jnp.put_along_axis(
        jnp.zeros(logits.shape, bool), order, before < top_p, axis=-1, inplace=False
    )
