"""Evaluates a trained model, and generates text with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from examples.llama import layout
from examples.llama.config import override
from examples.llama.data.batches import placed
from examples.llama.data.rows import held_out_batches
from examples.llama.data.text import open_text
from examples.llama.data.tokenizers import Tokenizer
from examples.llama.generate import Sampling, generate
from examples.llama.metrics import perplexity
from examples.llama.pure import PureLlama
from examples.llama.run_record import config_of
from examples.llama.steps import make_evaluation
from examples.llama.terminal import say
from examples.llama.weights.load import load_params


class Measured(NamedTuple):
    loss: float  # nats per token
    perplexity: float
    tokens: int


def evaluate(
    workdir: Path, other: Mapping[str, Any], mesh: str | None, console: Console
) -> Measured:
    """Measures the loss of the tokens of the held-out text.

    Args:
      workdir: Of the run.
      other: Settings of its data that are not to be the run's, by their dotted names.
      mesh: Of all devices.
      console: To tell what was left out of the text.
    """
    config = config_of(workdir)
    # As many rows at once as the run has had in memory.
    rows = config.micro_batch_size or config.data.batch_size
    # As a whole, so that it is checked with what the model asks for.
    other = {"data.batch_size": rows, "micro_batch_size": None, **other}
    data = override(config, other).data
    devices = layout.make_mesh(mesh, jax.devices())
    by_row = layout.by_row(devices, data.batch_size)
    weights = load_params(workdir, devices)
    weights.tokenizer()  # Weights that came without one cannot be measured.
    held_out = open_text(data, console).held_out()
    say(console, *held_out.notes)
    batches = list(held_out_batches(held_out.rows, data.batch_size))
    model = PureLlama(weights.config, weights.vocab_size, devices)
    evaluate = make_evaluation(
        model, [placed(batch, by_row) for batch in batches], layout.replicated(devices)
    )
    loss = evaluate(weights.params)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return Measured(loss, perplexity(loss), tokens)


def go_on(
    workdir: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> list[tuple[str, str]]:
    """Yields each prompt with the generated text; without a prompt, a new text."""
    weights = load_params(workdir)
    tokenizer = weights.tokenizer()
    ends = weights.stops or (tokenizer.end_of_text,)
    prompts = list(prompts) or [""]
    # If no token begins a document, it comes after the end of another document.
    begun = [
        [*tokenizer.begin, *ids.tolist()] or [ends[0]]
        for ids in tokenizer.encode(prompts)
    ]
    made = generate(
        PureLlama(weights.config, weights.vocab_size),
        jax.device_put(weights.params),
        begun,
        max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        key=jax.random.key(seed),
        end_of_text=ends,
    )
    return [
        (prompt, continuation(tokenizer, ids, row))
        for prompt, ids, row in zip(prompts, begun, made, strict=True)
    ]


def continuation(
    tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int] | np.ndarray
) -> str:
    """Returns the text of ``after`` in its context.

    Alone it might lose the space that it begins with, as SentencePiece takes that one
    for its own.
    """
    return tokenizer.decode([*before, *after])[len(tokenizer.decode(before)) :]
