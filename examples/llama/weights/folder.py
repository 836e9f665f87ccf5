"""Parameters alone: of a run's last checkpoint, or brought in from elsewhere.

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

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from examples.llama import files, hosts, layout
from examples.llama.checkpoint import Checkpoints, newest
from examples.llama.config import Config, ModelConfig
from examples.llama.data import tokenizer_files, tokenizers
from examples.llama.data.documents import DataError
from examples.llama.data.tokenizer_files import (
    PIECES,
    SENTENCEPIECE,
    SETTINGS,
    saved_file,
)
from examples.llama.data.tokenizers import Tokenizer
from examples.llama.divergence import are_finite, not_so
from examples.llama.pure import Params, PureLlama
from examples.llama.run_record import (
    data_of,
    model_of,
    record_weights,
    settings_of,
)
from examples.llama.weights import hugging_face
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.names import BadWeights, shown

_BYTES = "byte"
_HOW = ("compute_dtype", "param_dtype", "remat", "loss_chunk")


class Weights(NamedTuple):
    folder: Path
    config: ModelConfig
    vocab_size: int
    params: Params
    end_of_text: int | None
    stops: tuple[int, ...]
    """All ids that are known to end a text."""

    def tokenizer(self) -> Tokenizer:
        """Raises ``BadWeights`` where there is none, or that of another model."""
        settings = settings_of(self.folder)
        by_file = saved_file(self.folder) is not None
        if not by_file and settings.get("data", {}).get("tokenizer") != _BYTES:
            raise BadWeights(
                f"{self.folder} has no tokenizer: put its tokenizer.json or "
                "tokenizer.model there"
            )
        tokenizer = tokenizers.load_saved(self.folder)
        if data_of(self.folder).get("tokenizer") not in (None, tokenizer.fingerprint):
            raise BadWeights(
                f"{self.folder}: its tokenizer is not the one that it was trained "
                "with: put that one back"
            )
        return fitting(tokenizer, self.vocab_size, self.folder)


def fitting(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> Tokenizer:
    """Raises ``BadWeights`` where a text can get ids that the model has not."""
    if tokenizer.reach > vocab_size:
        raise BadWeights(
            f"{folder}: the tokenizer has {tokenizer.reach:,} ids for texts, the model "
            f"only {vocab_size:,} embeddings: put its own tokenizer there, or import "
            "the model resized by transformers (resize_token_embeddings)"
        )
    return tokenizer


def load_params(workdir: Path, mesh: Mesh | None = None) -> Weights:
    """From the newest good checkpoint of a run, or from imported weights.

    The optimizer's state is not read. The arrays are NumPy's; on a ``mesh`` they are
    JAX's, divided as ``layout`` says, and each process reads its own parts.

    Raises ``ValueError``, which names the file, where there is nothing good to read, or
    parameters are not finite.
    """
    try:
        config, data = model_of(workdir), data_of(workdir)
        vocab_size, end_of_text = data["vocab_size"], data["end_of_text"]
        ends = [] if end_of_text is None else [end_of_text]
        stops = tuple(data.get("stops") or ends)
        if not all(type(x) is int for x in (vocab_size, *stops)) or not all(
            0 <= x < vocab_size for x in stops
        ):
            raise TypeError(f"ends of text {shown(stops)} of {shown(vocab_size)} ids")
    except (TypeError, KeyError) as error:
        raise BadWeights(f"{workdir}: settings of another version: {error}") from error
    step = newest(workdir)
    # A run at work may have saved another one meanwhile.
    hosts.check_same(str(step), f"the last checkpoint of {workdir}")
    try:
        params = _restored(step, config, vocab_size, mesh)
    except Exception as error:  # Orbax passes on whatever its parts raise.
        if step.exists():
            raise
        raise BadWeights(
            f"{step}: removed while it was read, for the run at work there has saved "
            "others; run the same command again"
        ) from error
    _check_finite(params, step, mesh)
    return Weights(workdir, config, vocab_size, params, end_of_text, stops)


def _check_finite(params: Params, step: Path, mesh: Mesh | None) -> None:
    """On a ``mesh`` all processes find the same, whichever parts they have."""
    if mesh is None:
        found = jax.tree.map(lambda x: np.isfinite(x).all(), params)
    else:
        replicated = layout.replicated(mesh)
        found = jax.device_get(jax.jit(are_finite, out_shardings=replicated)(params))
    bad = not_so(found)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise BadWeights(
            f"{step}: {bad[0]}{more}: not finite, so the run has diverged; remove that "
            "folder to have the checkpoint before it, if there is one"
        )


def load_for(config: Config, vocab_size: int, mesh: Mesh) -> Params:
    """Those of ``config.init_from``, for the model of ``config``.

    Raises ``BadWeights`` where they are of another model.
    """
    assert config.init_from is not None
    weights = load_params(config.init_from, mesh)
    tokenizer = saved_file(config.init_from)
    if tokenizer is not None and Path(config.data.tokenizer) == tokenizer:
        weights.tokenizer()
    there = _meaning(weights.config) | {"vocab_size": weights.vocab_size}
    here = _meaning(config.model) | {"vocab_size": vocab_size}
    different = [
        f"\n  {name}: {there[name]} there, {here[name]} now"
        for name in there
        if there[name] != here[name]
    ]
    if different:
        raise BadWeights(f"{config.init_from} is another model:{''.join(different)}")
    return weights.params


def special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is recorded there of special tokens, for a run that goes on from there.

    Nothing where the run has another ``tokenizer``: then they are that one's.
    """
    data = data_of(folder)
    is_same = (
        saved_file(folder) is not None
        and tokenizers.load_saved(folder).fingerprint == tokenizer.fingerprint
        and tokenizer.end_of_text in data.get("stops", ())
    )
    return {x: data[x] for x in ("stops", "token_ids") if is_same and x in data}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What parameters are for: all but how they are computed with."""
    fields = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
    return {name: x for name, x in fields.items() if name not in _HOW}


def _restored(
    step: Path, config: ModelConfig, vocab_size: int, mesh: Mesh | None
) -> Params:
    init = PureLlama(config, vocab_size).init
    wanted = {"params": jax.eval_shape(init, jax.random.key(0))}
    _check_shapes(wanted, step)
    if mesh is None:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    else:
        how = jax.tree.map(
            lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding),
            {"params": layout.param_shardings(mesh, wanted["params"])},
        )
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(step / "default", args=args)["params"]


def _check_shapes(wanted: Any, step: Path) -> None:
    """Raise ``BadWeights`` where the settings are not those of the parameters there."""
    handler: Any = ocp.PyTreeCheckpointHandler()  # Its Path is etils', or any other.
    found = {"params": handler.metadata(step / "default")["params"]}
    there, here = _shapes(found), _shapes(wanted)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise BadWeights(
                f"{step}: {name} is {there.get(name, 'not there')}, by the settings "
                f"beside it {here.get(name, 'not there')}: they are not of that model"
            )


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{x.dtype} of {tuple(x.shape)}"
        )
        for path, x in jax.tree.leaves_with_path(tree)
    }


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
    """Make ``workdir`` of a Hugging Face folder or a GGUF file.

    The parameters are stored in ``dtype``, with layers stacked or not.

    Raises ``BadWeights`` for what is no Llama of ours, ``FileExistsError`` where
    ``workdir`` is there already.
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
    """Write it there, as Hugging Face's files; why not, where it cannot be."""
    try:
        pieces, settings = file.tokenizer(), file.tokenizer_settings()
    except BadWeights as error:
        return str(error)
    files.write(folder / PIECES, pieces.to_str(pretty=True))
    files.write(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    return ""


def _why_unusable(folder: Path, vocab_size: int, source: Path) -> str:
    """Of a tokenizer that is kept for an export anyhow; empty where it is good."""
    try:
        tokenizer = tokenizers.load_saved(folder)
    except DataError as error:
        return str(error).replace(str(folder), str(source))
    fitting(tokenizer, vocab_size, source)
    return ""


def export_weights(workdir: Path, folder: Path, dtype: Any = None) -> None:
    """Write the weights of ``workdir`` as a new Hugging Face folder; see its ``save``.

    Its tokenizer goes with them, where there is a file of it, and what is beside that.
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
    """As they came with the weights, or as the run had them."""
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
