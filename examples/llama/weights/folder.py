"""Parameters alone: of a run's last checkpoint, or brought in from elsewhere.

A folder that ``import_weights`` makes is laid out as a run's: ``config.yaml`` has the
settings of the model, ``data.json`` what ends a text, and the parameters are the
checkpoint of step 0, without an optimizer's state. The tokenizer's file is there if the
weights came with one.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from examples.llama import files, layout
from examples.llama.checkpoint import Checkpoints, newest
from examples.llama.config import Config, ModelConfig
from examples.llama.data import tokenizers
from examples.llama.data.tokenizers import Tokenizer
from examples.llama.pure import Params, PureLlama
from examples.llama.run_record import (
    data_of,
    model_of,
    record_weights,
    settings_of,
)
from examples.llama.weights import hugging_face
from examples.llama.weights.gguf_file import GGUFFile
from examples.llama.weights.names import BadWeights

_BYTES = "byte"
_HOW = ("compute_dtype", "param_dtype", "remat", "loss_chunk")


class Weights(NamedTuple):
    folder: Path
    config: ModelConfig
    vocab_size: int
    params: Params
    end_of_text: int | None

    def tokenizer(self) -> Tokenizer:
        """Raises ``BadWeights`` where the weights came without one."""
        settings = settings_of(self.folder)
        by_file = tokenizers.saved_file(self.folder) is not None
        if not by_file and settings.get("data", {}).get("tokenizer") != _BYTES:
            raise BadWeights(
                f"{self.folder} has no tokenizer: put its tokenizer.json or "
                "tokenizer.model there"
            )
        return tokenizers.load_saved(self.folder)


def load_params(workdir: Path, mesh: Mesh | None = None) -> Weights:
    """From the newest good checkpoint of a run, or from imported weights.

    The optimizer's state is not read. The arrays are NumPy's; on a ``mesh`` they are
    JAX's, divided as ``layout`` says, and each process reads its own parts.

    Raises ``ValueError``, which names the file, where there is nothing good to read.
    """
    config, data = model_of(workdir), data_of(workdir)
    params = _restored(newest(workdir), config, data["vocab_size"], mesh)
    return Weights(workdir, config, data["vocab_size"], params, data["end_of_text"])


def load_for(config: Config, vocab_size: int, mesh: Mesh) -> Params:
    """Those of ``config.init_from``, for the model of ``config``.

    Raises ``BadWeights`` where they are of another model.
    """
    assert config.init_from is not None
    weights = load_params(config.init_from, mesh)
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


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """What parameters are for: all but how they are computed with."""
    fields = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
    return {name: x for name, x in fields.items() if name not in _HOW}


def _restored(
    step: Path, config: ModelConfig, vocab_size: int, mesh: Mesh | None
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
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(step / "default", args=args)["params"]


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
            ends = hugging_face.ends(source)
            if not tokenizers.copy_saved(source, part):
                without_tokenizer = f"{source} has no tokenizer.json or tokenizer.model"
        else:
            file = GGUFFile(source)
            loaded = file.load(dtype, scan_layers=scan_layers)
            ends = file.ends()
            try:
                file.tokenizer().save(str(part / "tokenizer.json"))
            except BadWeights as error:
                without_tokenizer = str(error)
        config, vocab_size, params = loaded
        config = dataclasses.replace(config, param_dtype=dtype)
        with Checkpoints(part) as checkpoints:
            checkpoints.save(0, {"params": params})
        record_weights(part, config, ends | {"vocab_size": vocab_size})
    return Imported(config, vocab_size, without_tokenizer)


def export_weights(workdir: Path, folder: Path, dtype: Any = None) -> None:
    """Write the weights of ``workdir`` as a new Hugging Face folder; see its ``save``.

    Its tokenizer goes with them, where there is a file of it.
    """
    weights = load_params(workdir)
    hugging_face.save(
        folder,
        weights.config,
        weights.vocab_size,
        weights.params,
        dtype=dtype,
        context=data_of(workdir)["context"] or 2048,
        end_of_text=weights.end_of_text,
        tokenizer=tokenizers.saved_file(workdir),
    )
