"""LlamaForCausalLM as a folder: ``config.json`` and safetensors, one file or shards.

Neither way is more than one tensor, or one shard, in memory besides the parameters.
"""

import dataclasses
import json
import os
import re
import shutil
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
from examples.llama.pure import Params
from examples.llama.weights.hugging_face_config import config_json, read_config
from examples.llama.weights.names import (
    HUGGING_FACE,
    BadWeights,
    as_tensors,
    check_tensors,
    unfilled,
)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")
# Tables that old files carry; the model computes them from its settings.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def load(
    folder: Path, dtype: Any = "float32", *, scan_layers: bool = True
) -> tuple[ModelConfig, int, Params]:
    """The model, the vocabulary's size and the parameters, NumPy arrays of ``dtype``.

    Raises ``BadWeights``, which names file and setting or tensor, before any tensor is
    read.
    """
    if not (folder / "config.json").is_file():
        raise BadWeights(f"{folder}: no config.json there, so no model to read")
    config, vocab_size = read_config(folder / "config.json")
    config = dataclasses.replace(config, scan_layers=scan_layers)
    params = unfilled(config, vocab_size, jnp.dtype(dtype))
    wanted = as_tensors(params, HUGGING_FACE)
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
        check_tensors(wanted, found, promised, source)
        for name, (file, _) in found.items():
            wanted[name][...] = opened[file].get_tensor(name)
    return config, vocab_size, params


def ends(folder: Path) -> dict[str, int | None]:
    """The token that ends a text, the first where several do; the longest text."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    number = found.get("eos_token_id")
    return {
        "end_of_text": number[0] if isinstance(number, list) else number,
        "context": found.get("max_position_embeddings"),
    }


def _index(folder: Path) -> tuple[dict[str, Path], Path]:
    """The shard of each tensor, none where there is one file; and what says so."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return {}, single
    if not index.is_file():
        raise BadWeights(f"{folder}: neither {_SINGLE} nor {_INDEX} there")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}, index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadWeights(f"{index}: not an index of shards: {error!r}") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
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
    end_of_text: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write ``folder``, which must not be there; it appears when all of it is written.

    Args:
      params: With layers stacked or not, as ``config`` says.
      dtype: Of the files; None: that of the parameters.
      shard_bytes: More than so many bytes of tensors are divided among files.
      context: Tokens of a row that the model was trained on, for whoever asks it.
      tokenizer: A ``tokenizer.json``, or a SentencePiece ``.model``, to go with it.
    """
    tensors = as_tensors(jax.tree.map(np.asarray, params), HUGGING_FACE)
    dtype = jnp.dtype(dtype or next(iter(tensors.values())).dtype)
    with files.new_folder(folder) as part:
        _write_tensors(part, tensors, dtype, shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(part, tokenizer, end_of_text)
        settings = config_json(
            config,
            vocab_size,
            dtype=dtype.name,
            context=context,
            end_of_text=end_of_text,
        )
        files.write(part / "config.json", settings)


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
        save_file(shard, file, {"format": "pt"})
        _sync(file)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        size = sum(x.size for x in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.write(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _in_order(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """Rows one after the other: what is written is memory as it lies."""
    try:
        with np.errstate(over="raise"):
            return np.ascontiguousarray(tensor, dtype)
    except FloatingPointError as error:
        raise BadWeights(f"{name} has values too large for {dtype}") from error


def _divided(
    tensors: Mapping[str, np.ndarray], itemsize: int, limit: int
) -> Iterator[Sequence[str]]:
    """Names in their order, of at most ``limit`` bytes together, or of one tensor."""
    names, total = [], 0
    for name, tensor in tensors.items():
        nbytes = tensor.size * itemsize
        if names and total + nbytes > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += nbytes
    yield names


def _write_tokenizer(folder: Path, tokenizer: Path, end_of_text: int | None) -> None:
    if tokenizer.suffix == ".model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        return
    text = tokenizer.read_text(encoding="utf-8")
    files.write(folder / "tokenizer.json", text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if end_of_text is not None:
        pieces = tokenizers.Tokenizer.from_str(text)
        settings["eos_token"] = pieces.id_to_token(end_of_text)
    files.write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
