"""Loads only the parameters, of a run's last checkpoint or of imported weights."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from examples.llama import hosts, layout
from examples.llama.checkpoint import newest
from examples.llama.config import ModelConfig
from examples.llama.data import tokenizers
from examples.llama.data.tokenizer_files import saved_file
from examples.llama.data.tokenizers import Tokenizer
from examples.llama.divergence import are_finite, not_so
from examples.llama.pure import Params, PureLlama
from examples.llama.run_record import data_of, model_of, settings_of
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
        """Raises ``BadWeights`` if there is none, or one of another model."""
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
    """Raises ``BadWeights`` if a text can get ids that the model does not have."""
    if tokenizer.reach > vocab_size:
        raise BadWeights(
            f"{folder}: the tokenizer has {tokenizer.reach:,} ids for texts, the model "
            f"only {vocab_size:,} embeddings: put its own tokenizer there, or import "
            "the model resized by transformers (resize_token_embeddings)"
        )
    return tokenizer


def load_params(workdir: Path, mesh: Mesh | None = None) -> Weights:
    """Loads parameters from a run's newest good checkpoint or from imported weights.

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
    """Checks that parameters are finite; on a ``mesh`` all processes agree."""
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


def load_for(
    folder: Path, model: ModelConfig, vocab_size: int, tokenizer: str, mesh: Mesh
) -> Params:
    """Loads the parameters in ``folder``, to start a run of ``model`` with.

    If the run has its ``tokenizer`` from there too, that is checked. Raises
    ``BadWeights`` if the parameters are of another model.
    """
    weights = load_params(folder, mesh)
    if saved_file(folder) == Path(tokenizer):
        weights.tokenizer()
    there = _meaning(weights.config) | {"vocab_size": weights.vocab_size}
    here = _meaning(model) | {"vocab_size": vocab_size}
    different = [
        f"\n  {name}: {there[name]} there, {here[name]} now"
        for name in there
        if there[name] != here[name]
    ]
    if different:
        raise BadWeights(f"{folder} is another model:{''.join(different)}")
    return weights.params


def special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the recorded ids of special tokens, for a run that starts from there.

    It returns nothing if the run has another ``tokenizer``, with ids of its own.
    """
    data = data_of(folder)
    is_same = (
        saved_file(folder) is not None
        and tokenizers.load_saved(folder).fingerprint == tokenizer.fingerprint
        and tokenizer.end_of_text in data.get("stops", ())
    )
    return {x: data[x] for x in ("stops", "token_ids") if is_same and x in data}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that give parameters their meaning."""
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
    """Raises ``BadWeights`` if the settings do not fit the parameters there."""
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
