"""What one does with a model that is there: measure it, and let it write."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from examples.llama import layout
from examples.llama.commands import Eval, Generate, config_of
from examples.llama.config import override
from examples.llama.data.batches import placed
from examples.llama.data.rows import held_out_batches
from examples.llama.data.text import open_text
from examples.llama.data.tokenizers import Tokenizer
from examples.llama.generate import generate
from examples.llama.metrics import perplexity
from examples.llama.pure import PureLlama
from examples.llama.steps import make_evaluation
from examples.llama.terminal import say
from examples.llama.weights.folder import load_params


class Measured(NamedTuple):
    loss: float  # nats per token
    perplexity: float
    tokens: int


def evaluate(command: Eval, console: Console) -> Measured:
    """The loss of each token of the held-out text, from those before it in its row."""
    config = config_of(command.workdir)
    names = ("eval_tokens", "seq_len", "batch_size")
    given = {f"data.{name}": getattr(command, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if command.data is not None:
        given |= {"data.path": command.data, "data.hub": None}
    if command.skip_bad_lines:
        given["data.skip_bad_lines"] = True
    # As many rows at once as the run has had in memory.
    given.setdefault(
        "data.batch_size", config.micro_batch_size or config.data.batch_size
    )
    # As a whole, so that it is checked with what the model asks for.
    data = override(config, given | {"micro_batch_size": None}).data
    mesh = layout.make_mesh(command.mesh, jax.devices())
    by_row = layout.by_row(mesh, data.batch_size)
    weights = load_params(command.workdir, mesh)
    weights.tokenizer()  # Weights that came without one cannot be measured.
    held_out = open_text(data, console).held_out()
    say(console, *held_out.notes)
    batches = list(held_out_batches(held_out.rows, data.batch_size))
    model = PureLlama(weights.config, weights.vocab_size, mesh)
    evaluate = make_evaluation(
        model, [placed(batch, by_row) for batch in batches], layout.replicated(mesh)
    )
    loss = evaluate(weights.params)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return Measured(loss, perplexity(loss), tokens)


def go_on(command: Generate) -> list[tuple[str, str]]:
    """Each prompt, and what the model has to say after it."""
    weights = load_params(command.workdir)
    tokenizer = weights.tokenizer()
    ends = weights.stops or (tokenizer.end_of_text,)
    prompts = list(command.prompt) or [""]
    # Where a document begins with nothing, it comes after the end of another.
    begun = [
        [*tokenizer.begin, *ids.tolist()] or [ends[0]]
        for ids in tokenizer.encode(prompts)
    ]
    made = generate(
        PureLlama(weights.config, weights.vocab_size),
        jax.device_put(weights.params),
        begun,
        command.max_new_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        key=jax.random.key(command.seed),
        end_of_text=ends,
    )
    return [
        (prompt, continuation(tokenizer, ids, row))
        for prompt, ids, row in zip(prompts, begun, made, strict=True)
    ]


def continuation(
    tokenizer: Tokenizer, before: Sequence[int], after: Sequence[int] | np.ndarray
) -> str:
    """The text of ``after`` where it stands.

    Alone it might lose the space that it begins with, as SentencePiece takes that one
    for its own.
    """
    return tokenizer.decode([*before, *after])[len(tokenizer.decode(before)) :]
