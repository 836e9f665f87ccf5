"""The text of a run, which is found at once and tokenised when needed."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from examples.llama import files
from examples.llama.config import DataConfig
from examples.llama.data import token_cache, tokenizers
from examples.llama.data.documents import BadLines, DataError, Source, Split
from examples.llama.data.hub import Hub
from examples.llama.data.library import StandardLibrary
from examples.llama.data.progress import TokenisingProgress
from examples.llama.data.rows import DocumentRows, PackedRows, Rows
from examples.llama.data.shards import Shards
from examples.llama.data.token_cache import Limit, Tokens
from examples.llama.data.tokenizers import Tokenizer

_WHAT = {"train": "training text", "validation": "held-out text"}


class TextData(NamedTuple):
    train: Rows
    held_out: Rows
    tokens: int  # Of the training text, in an epoch of packed rows.
    notes: list[str]  # What was left out of it.


class Part(NamedTuple):
    rows: Rows
    tokens: int
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Text:
    """The source of a run's tokens, which are not read yet."""

    config: DataConfig
    source: Source
    tokenizer: Tokenizer
    console: Console

    @property
    def vocab_size(self) -> int:
        """Ids of the model."""
        return tokenizers.model_vocabulary(self.tokenizer, self.config.vocab_size)

    @property
    def fingerprint(self) -> str:
        """It changes if a token of training or evaluation may change."""
        held_out, train = (  # The small one first: if it is missing, that is told soon.
            token_cache.key_of(self.source, split, self.tokenizer, self._limit(split))
            for split in ("validation", "train")
        )
        tokenizer = self.tokenizer.fingerprint[:16]
        return f"train {train[:16]}, held out {held_out[:16]}, tokenizer {tokenizer}"

    def load(self) -> TextData:
        """Returns rows for training and evaluation, and tokenises them if necessary."""
        train, held_out = self.train(), self.held_out()
        notes = [*train.notes, *held_out.notes]
        return TextData(train.rows, held_out.rows, train.tokens, notes)

    def train(self) -> Part:
        tokens, seq_len = self._tokens("train"), self.config.seq_len
        if self.config.batching == "one-per-row":
            rows = self._one_per_row(tokens)
        else:
            rows = PackedRows(tokens.ids, seq_len)
        if not len(rows):
            raise DataError(
                f"the training text has {len(tokens.ids)} tokens, a single row of "
                f"seq_len {seq_len} needs {seq_len + 1}"
            )
        return Part(rows, len(tokens.ids), _notes(tokens, "train"))

    def held_out(self) -> Part:
        tokens, config = self._tokens("validation"), self.config
        if config.batching == "one-per-row":
            rows = self._one_per_row(tokens)
        else:
            pad, length = self.tokenizer.pad, config.eval_tokens + 1
            rows = PackedRows(tokens.ids, config.seq_len, pad, length)
        return Part(rows, len(tokens.ids), _notes(tokens, "validation"))

    def _one_per_row(self, tokens: Tokens) -> Rows:
        seq_len, pad = self.config.seq_len, self.tokenizer.pad
        return DocumentRows(tokens.ids, tokens.ends, seq_len, pad)

    def _tokens(self, split: Split) -> Tokens:
        tokens = token_cache.tokenise(
            self.source,
            split,
            self.tokenizer,
            self._limit(split),
            self.config.cache,
            TokenisingProgress(_WHAT[split], self.console),
            self.config.skip_bad_lines,
        )
        around = len(self.tokenizer.begin) + len(self.tokenizer.end)
        if len(tokens.ids) == len(tokens.ends) * around:
            raise DataError(f"the tokenizer has no ids for any of the {_WHAT[split]}")
        return tokens

    def _limit(self, split: Split) -> Limit:
        """Returns how much of a split is read; an evaluation limits held-out text."""
        config = self.config
        tokens = config.train_tokens if split == "train" else config.eval_tokens + 1
        if tokens is None or config.batching == "packed":
            return Limit(tokens)
        return Limit(tokens, per_document=config.seq_len)


def open_text(config: DataConfig, console: Console) -> Text:
    """Opens the source and the tokenizer that ``config`` names; trains a BPE."""
    source = open_source(config)
    text = Text(config, source, _tokenizer(config, source), console)
    assert text.vocab_size  # Too few ids are an error now, not after tokenising.
    return text


def planned_vocabulary(config: DataConfig) -> tuple[int, list[str]]:
    """Returns the number of ids of ``open_text(config)``, without reading the text.

    It also returns a note if most of them are not used.
    """
    if config.tokenizer == "bpe":
        assert config.vocab_size is not None  # checked by DataConfig
        return config.vocab_size, []
    path = None if config.tokenizer == "byte" else Path(config.tokenizer)
    tokenizer = tokenizers.load_file(path) if path else tokenizers.ByteTokenizer()
    size = tokenizers.model_vocabulary(tokenizer, config.vocab_size)
    return size, tokenizers.unused_ids(tokenizer, size)


def open_source(config: DataConfig) -> Source:
    if config.cache.exists() and not config.cache.is_dir():
        raise DataError(f"`data.cache: {config.cache}`: not a folder; give another")
    memory = config.cache / "digests"
    if config.hub is not None:
        return Hub(config.hub, memory)
    if config.path is not None:
        return Shards(config.path, memory)
    return StandardLibrary()


def read_texts(
    source: Source, split: Split, skip_bad_lines: bool = False
) -> Iterator[str]:
    """Yields the texts one after the other."""
    for document in source.documents(split, BadLines(skip_bad_lines)):
        yield document.text


def _tokenizer(config: DataConfig, source: Source) -> Tokenizer:
    if config.tokenizer == "byte":
        return tokenizers.ByteTokenizer()
    if config.tokenizer != "bpe":
        return tokenizers.load_file(Path(config.tokenizer))
    assert config.vocab_size is not None  # checked by DataConfig
    # Of other text it has another name: a run never meets a stale one.
    text = source.fingerprint("train")[:16]
    folder = config.cache / f"bpe-{config.vocab_size}-{text}"
    note = folder / "fingerprint"  # Written last: all is there, and stays as it is.
    if not note.exists():
        texts = read_texts(source, "train", config.skip_bad_lines)
        trained = tokenizers.train_bpe(texts, config.vocab_size)
        files.make_folder(folder)
        trained.save(folder)
        files.write(note, trained.fingerprint)
    try:
        tokenizer = tokenizers.load_saved(folder)
        if tokenizer.fingerprint.encode() != note.read_bytes():
            raise DataError("not the tokenizer that was trained")
    except DataError as error:
        raise DataError(
            f"{folder}: damaged: {error}; remove the folder, and the tokenizer is "
            "trained again"
        ) from error
    return tokenizer


def _notes(tokens: Tokens, split: Split) -> list[str]:
    if not tokens.bad_lines:
        return []
    lines = "line" if tokens.bad_lines == 1 else "lines"
    more = tokens.bad_lines > len(tokens.first_bad_lines)
    shown = f"; the first {len(tokens.first_bad_lines)}" if more else ""
    return [
        f"{tokens.bad_lines:,} bad {lines} of the {_WHAT[split]} left out{shown}:",
        *(f"  {line}" for line in tokens.first_bad_lines),
    ]
