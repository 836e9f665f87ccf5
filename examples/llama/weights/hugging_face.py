"""LlamaForCausalLM as a folder: ``config.json`` and safetensors, one file or shards.

At most one tensor or one shard is in memory besides the parameters.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from examples.llama import files
from examples.llama.config import ModelConfig
from examples.llama.data import tokenizer_files
from examples.llama.data.tokenizer_files import (
    GENERATION,
    SENTENCEPIECE,
    SETTINGS,
    read_beside,
    saved_file,
)
from examples.llama.pure import Params
from examples.llama.weights.hugging_face_config import (
    config_json,
    listed,
    read_config,
    read_context,
    read_token_ids,
)
from examples.llama.weights.names import (
    HUGGING_FACE,
    BadWeights,
    as_tensors,
    check_sizes,
    check_tensors,
    fill,
    outline,
    shown,
    unfilled,
)

_CONFIG, _SINGLE = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
_HEAD, _EMBEDDING = HUGGING_FACE["head/kernel"], HUGGING_FACE["embed/embedding"]
# Tables that old files carry; the model computes them from its settings.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def load(
    folder: Path, dtype: Any = "float32", *, scan_layers: bool = True
) -> tuple[ModelConfig, int, Params]:
    """Loads the model, the vocabulary's size and parameters, NumPy arrays of ``dtype``.

    Raises ``ValueError``, which names file and setting or tensor, before any tensor is
    read where it can.
    """
    config, vocab_size = read_config(_config(folder))
    config = dataclasses.replace(config, scan_layers=scan_layers)
    promised, source = _index(folder)
    with ExitStack() as stack:
        shards = sorted(set(promised.values()) or {source})
        opened = {file: stack.enter_context(_open(file)) for file in shards}
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file, shard in opened.items():
            for name in shard.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise BadWeights(f"{found[name][0]} and {file} both hold {name}")
                if not _IGNORED.search(name):
                    found[name] = file, _shape(file, name, shard.get_slice(name))
        check_sizes(config, vocab_size, found, folder / _CONFIG)
        head = found.pop(_HEAD, None) if config.tie_embeddings else None
        shapes = outline(config, vocab_size, jnp.dtype(dtype))
        check_tensors(as_tensors(shapes, HUGGING_FACE), found, promised, source)
        if head is not None:
            embedding = opened[found[_EMBEDDING][0]].get_tensor(_EMBEDDING)
            _check_tied(embedding, opened[head[0]].get_tensor(_HEAD), head[0])
        params = unfilled(config, vocab_size, jnp.dtype(dtype))
        wanted = as_tensors(params, HUGGING_FACE)
        for name, (file, _) in found.items():
            fill(wanted[name], opened[file].get_tensor(name), file, name)
    return config, vocab_size, params


def _check_tied(embedding: np.ndarray, head: np.ndarray, file: Path) -> None:
    """Checks files of tied models, some of which have the matrix twice."""
    if not np.array_equal(embedding, head):
        raise BadWeights(
            f"{file}: {_HEAD} differs from {_EMBEDDING}, which {_CONFIG} says are one "
            "(tie_word_embeddings): say false there to have both, or remove the tensor"
        )


def about(folder: Path) -> dict[str, Any]:
    """Returns everything except parameters and shapes, for a run's record.

    The number of ids and the longest text, the ids of special tokens and all that end a
    text, the first of which is ``end_of_text``. Raises as ``load``.
    """
    file, generation = _config(folder), folder / GENERATION
    _, vocab_size = read_config(file)
    token_ids = read_token_ids(file, vocab_size)
    found = [token_ids]
    if generation.exists():
        found.append(read_token_ids(generation, vocab_size, ["eos_token_id"]))
    ends = [end for ids in found for end in listed(ids.get("eos_token_id"))]
    return {
        "vocab_size": vocab_size,
        "end_of_text": ends[0] if ends else None,
        "stops": list(dict.fromkeys(ends)),
        "context": read_context(file),
        "token_ids": token_ids,
    }


def _config(folder: Path) -> Path:
    if not (folder / _CONFIG).is_file():
        raise BadWeights(f"{folder}: no {_CONFIG} there, so no model to read")
    return folder / _CONFIG


def _index(folder: Path) -> tuple[dict[str, Path], Path]:
    """Returns the shard of each tensor, none if there is one file, and the index."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return {}, single
    if not index.exists():
        raise BadWeights(f"{folder}: neither {_SINGLE} nor {_INDEX} there")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadWeights(f"{index}: not an index of shards: it has no weight_map")
    for name, file in weight_map.items():
        # A file of another folder does not belong to the model.
        if not isinstance(file, str) or Path(file).name != file:
            raise BadWeights(
                f"{index}: {shown(name)} is in {shown(file)}, which is no name of a "
                "file of that folder"
            )
    return {name: folder / file for name, file in weight_map.items()}, index


def _open(file: Path) -> Any:
    try:
        files.require_regular(file)
        return safe_open(file, "numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadWeights(f"{file}: not a whole safetensors file: {error}") from error


def _shape(file: Path, name: str, part: Any) -> tuple[int, ...]:
    if part.get_dtype() not in _FLOATS:
        raise BadWeights(
            f"{file}: tensor {name} is {part.get_dtype()}, not one of "
            f"{', '.join(_FLOATS)}"
        )
    return tuple(part.get_shape())


def save(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    params: Params,
    *,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
    context: int = 2048,
    token_ids: Mapping[str, Any] = {},
    tokenizer: Path | None = None,
) -> None:
    """Writes ``folder``, which must not exist; it appears when it is complete.

    Args:
      params: With layers stacked or not, as ``config`` says.
      dtype: Of the files; None: that of the parameters.
      shard_bytes: More than so many bytes of tensors are divided among files.
      context: Tokens of a row that the model was trained on, for whoever asks it.
      token_ids: For its ``config.json``, by the names there.
      tokenizer: A folder whose tokenizer, and what is beside it, is to go with it.
    """
    tensors = as_tensors(jax.tree.map(np.asarray, params), HUGGING_FACE)
    dtype = jnp.dtype(dtype or next(iter(tensors.values())).dtype)
    with files.new_folder(folder) as part:
        _write_tensors(part, tensors, dtype, shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(part, tokenizer, token_ids)
        settings = config_json(
            config,
            vocab_size,
            dtype=dtype.name,
            context=context,
            token_ids=token_ids,
        )
        files.write(part / _CONFIG, settings)


def _write_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], dtype: Any, shard_bytes: int
) -> None:
    shards = list(_divided(tensors, dtype.itemsize, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = folder / _SINGLE
        if len(shards) > 1:
            file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: _in_order(name, tensors[name], dtype) for name in names}
        try:
            save_file(shard, file, {"format": "pt"})
        except SafetensorError as error:  # As on a full disk.
            raise OSError(f"{folder / file.name}: {error}") from error
        _sync(file)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        size = sum(x.size for x in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.write(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _in_order(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns an array in C order, since memory is written as it is."""
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(tensor, dtype)
    except FloatingPointError as error:
        raise BadWeights(f"{name} has values too large for {dtype}") from error


def _divided(
    tensors: Mapping[str, np.ndarray], itemsize: int, limit: int
) -> Iterator[Sequence[str]]:
    """Groups names in order, of at most ``limit`` bytes together or of one tensor."""
    names, total = [], 0
    for name, tensor in tensors.items():
        nbytes = tensor.size * itemsize
        if names and total + nbytes > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += nbytes
    yield names


def _write_tokenizer(folder: Path, source: Path, token_ids: Mapping[str, Any]) -> None:
    """Writes the tokenizer, with settings for the same ids around a text."""
    tokenizer_files.copy(source, folder)
    tokenizer = saved_file(folder)
    if tokenizer is None:
        return
    settings = dict(read_beside(tokenizer).settings)
    if "tokenizer_class" in settings:  # Somebody else's, and complete.
        return
    if tokenizer.name == SENTENCEPIECE:
        settings = {"add_bos_token": False, "add_eos_token": False} | settings
    else:
        plain: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        pieces = tokenizers.Tokenizer.from_file(str(tokenizer))
        ends = listed(token_ids.get("eos_token_id"))[:1]
        if ends:
            plain["eos_token"] = pieces.id_to_token(ends[0])
        settings = plain | settings
    files.write(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
