"""Imports weights as a run's folder, and exports them.

A folder that ``import_weights`` makes is laid out as a run's: ``config.yaml`` has the
settings of the model, ``data.json`` what ends a text, and the parameters are the
checkpoint of step 0, without an optimizer's state. The tokenizer's file, and what was
beside it, is there if the weights came with one.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama import files
from examples.llama.checkpoint import Checkpoints
from examples.llama.config import ModelConfig
from examples.llama.data import tokenizer_files, tokenizers
from examples.llama.data.documents import DataError
from examples.llama.data.tokenizer_files import (
    PIECES,
    SENTENCEPIECE,
    SETTINGS,
    saved_file,
)
from examples.llama.run_record import data_of, record_weights
from examples.llama.weights import hugging_face
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.load import Weights, fitting, load_params
from examples.llama.weights.names import BadWeights


class Imported(NamedTuple):
    config: ModelConfig
    vocab_size: int
    without_tokenizer: str  # Why; empty where there is one.


def import_weights(
    source: Path,
    workdir: Path,
    dtype: Any = "float32",
    *,
    scan_layers: bool = True,
) -> Imported:
    """Makes ``workdir`` from a Hugging Face folder or a GGUF file.

    The parameters are stored in ``dtype``, with layers stacked or not.

    Raises ``BadWeights`` for weights of another model, ``FileExistsError`` if
    ``workdir`` exists already.
    """
    with files.new_folder(workdir) as part:
        if source.is_dir():
            about = hugging_face.about(source)
            tokenizer_files.copy(source, part)
            why = f"{source} has no {PIECES} or {SENTENCEPIECE}"
            load = partial(hugging_face.load, source)
        else:
            file = GGUFFile(source)
            about = file.about()
            why = _tokenizer_of(file, part)
            load = file.load
        if saved_file(part) is not None:
            why = _why_unusable(part, about["vocab_size"], source)
        config, vocab_size, params = load(dtype, scan_layers=scan_layers)
        config = dataclasses.replace(config, param_dtype=dtype)
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, {"params": params})
        record_weights(part, config, about)
    return Imported(config, vocab_size, why)


def _tokenizer_of(file: GGUFFile, folder: Path) -> str:
    """Writes the tokenizer as Hugging Face files; returns why if it cannot."""
    try:
        pieces, settings = file.tokenizer(), file.tokenizer_settings()
    except BadWeights as error:
        return str(error)
    files.write(folder / PIECES, pieces.to_str(pretty=True))
    files.write(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    return ""


def _why_unusable(folder: Path, vocab_size: int, source: Path) -> str:
    """Returns why a tokenizer is only kept for an export; empty if it is usable."""
    try:
        tokenizer = tokenizers.load_saved(folder)
    except DataError as error:
        return str(error).replace(str(folder), str(source))
    fitting(tokenizer, vocab_size, source)
    return ""


def export_weights(workdir: Path, folder: Path, dtype: Any = None) -> None:
    """Writes the weights of ``workdir`` as a new Hugging Face folder; see ``save``.

    The file of its tokenizer, if any, and the files beside it are copied.
    """
    weights = load_params(workdir)
    hugging_face.save(
        folder,
        weights.config,
        weights.vocab_size,
        weights.params,
        dtype=dtype,
        context=data_of(workdir).get("context") or 2048,
        token_ids=_token_ids(weights),
        tokenizer=workdir,
    )


def _token_ids(weights: Weights) -> dict[str, Any]:
    """Returns the ids that came with the weights, or those of the run."""
    data = data_of(weights.folder)
    if data.get("tokenizer") is not None:
        weights.tokenizer()  # Or the wrong one, or none, would go with them.
    if data.get("token_ids") is not None:
        return data["token_ids"]
    begin = ()
    if saved_file(weights.folder) is not None:
        begin = weights.tokenizer().begin
    begin_of_text = begin[0] if begin else None
    return {"bos_token_id": begin_of_text, "eos_token_id": weights.end_of_text}
