"""Parameters alone: of a run's last checkpoint, or brought in from elsewhere.

A folder that ``import_weights`` makes is laid out as a run's: ``config.json`` has the
settings of the model, and the parameters are the checkpoint of step 0, without an
optimizer's state. ``tokenizer.json`` is there if the weights came with one.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from examples.llama import files, layout
from examples.llama.checkpoint import Checkpoints, newest
from examples.llama.config import ModelConfig, as_fields
from examples.llama.model import Params, PureLlama
from examples.llama.weights import hugging_face
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.names import BadWeights

_TOKENIZER = "tokenizer.json"


class Weights(NamedTuple):
    config: ModelConfig
    vocab_size: int
    params: Params
    end_of_text: int | None  # As imported weights say it; a run's data knows its own.
    tokenizer: Path | None  # A tokenizer.json in the folder.


def load_params(workdir: Path, mesh: Mesh | None = None) -> Weights:
    """From the newest good checkpoint of a run, or from imported weights.

    The optimizer's state is not read. The arrays are NumPy's; on a ``mesh`` they are
    JAX's, divided as ``layout`` says, and each process reads its own parts.

    Raises ``ValueError``, which names the file, where there is nothing good to read.
    """
    record_file = workdir / "config.json"
    if not record_file.is_file():
        raise BadWeights(f"{workdir}: no config.json, so neither a run nor weights")
    record = json.loads(record_file.read_text())
    config = ModelConfig(
        **{
            name.removeprefix("model."): value
            for name, value in record.items()
            if name.startswith("model.")
        }
    )
    step = newest(workdir)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(
        step.parent, options=options, item_handlers=ocp.PyTreeCheckpointHandler()
    ) as manager:
        stored: Any = manager.item_metadata(int(step.name))
        vocab_size = stored["params"]["embed"]["embedding"].shape[0]
        params = _restored(manager, int(step.name), config, vocab_size, mesh)
    tokenizer = workdir / _TOKENIZER
    return Weights(
        config,
        vocab_size,
        params,
        record.get("end_of_text"),
        tokenizer if tokenizer.is_file() else None,
    )


def _restored(
    manager: ocp.CheckpointManager,
    step: int,
    config: ModelConfig,
    vocab_size: int,
    mesh: Mesh | None,
) -> Params:
    init = PureLlama(config, vocab_size).init
    wanted = {"params": jax.eval_shape(init, jax.random.key(0))}
    if mesh is None:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    else:
        how = jax.tree.map(
            lambda sharding: ocp.ArrayRestoreArgs(sharding=sharding),
            {"params": layout.param_shardings(mesh, wanted["params"])},
        )
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
    return manager.restore(step, args=args)["params"]


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
    without_tokenizer = ""
    with files.new_folder(workdir) as part:
        if source.is_dir():
            loaded = hugging_face.load(source, dtype, scan_layers=scan_layers)
            end_of_text = hugging_face.end_of_text(source)
            if (source / _TOKENIZER).is_file():
                shutil.copyfile(source / _TOKENIZER, part / _TOKENIZER)
            else:
                without_tokenizer = f"{source} has no {_TOKENIZER}"
        else:
            file = GGUFFile(source)
            loaded = file.load(dtype, scan_layers=scan_layers)
            end_of_text = file.end_of_text()
            try:
                file.tokenizer().save(str(part / _TOKENIZER))
            except BadWeights as error:
                without_tokenizer = str(error)
        config, vocab_size, params = loaded
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, {"params": params})
        record = as_fields(config, "model.") | {"end_of_text": end_of_text}
        files.write(part / "config.json", json.dumps(record, indent=2) + "\n")
    return Imported(config, vocab_size, without_tokenizer)


def export_weights(
    workdir: Path,
    folder: Path,
    *,
    dtype: Any = None,
    context: int = 2048,
    end_of_text: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of ``workdir`` as a new Hugging Face folder; see its ``save``.

    ``end_of_text`` and ``tokenizer`` are by default those that the weights came with.
    """
    weights = load_params(workdir)
    hugging_face.save(
        folder,
        weights.config,
        weights.vocab_size,
        weights.params,
        dtype=dtype,
        context=context,
        end_of_text=weights.end_of_text if end_of_text is None else end_of_text,
        tokenizer=tokenizer or weights.tokenizer,
    )
