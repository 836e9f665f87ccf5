"""Runs of MaxText's training loop, one after another in a process of its own.

    python maxtext_runs.py LAUNCHER RUNS RESULTS

RUNS maps names to MaxText's arguments, RESULTS the names to what came of them. Starting
MaxText takes longer than one of these runs.
"""

import hashlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from maxtext.trainers.pre_train import train
from maxtext.utils import train_utils
from maxtext.utils.globals import MAXTEXT_PKG_DIR

import lorapre_jax as lp
from lorapre_jax import _muon

BASE = os.path.join(MAXTEXT_PKG_DIR, "configs", "base.yml")


def main(launcher: str, runs: str, results: str) -> None:
    load(launcher)
    done = {}
    for name, arguments in json.loads(Path(runs).read_text()).items():
        try:
            done[name] = run(arguments, Path(results).with_name(f"{name}.metrics"))
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            print(text, file=sys.stderr)
            done[name] = {"error": text}
        Path(results).write_text(json.dumps(done))


def load(launcher: str) -> None:
    spec = importlib.util.spec_from_file_location("launcher", launcher)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def run(arguments: list[str], metrics: Path) -> dict:
    seen = {}
    set_up, make = train_utils.setup_train_loop, train_utils.create_training_optimizer

    def setup_train_loop(*args, **kwargs):
        loop = set_up(*args, **kwargs)
        seen["start"] = digests(loop[-1].model)
        return loop

    def create_training_optimizer(config, model, mesh=None):
        schedule, tx = make(config, model, mesh)
        seen["kept"] = kept(tx, model)
        return schedule, tx

    seen["shares"], exchange = 0, _muon.orthogonalize_shares

    def orthogonalize_shares(*args):
        seen["shares"] += 1
        return exchange(*args)

    _muon.orthogonalize_shares = orthogonalize_shares
    train_utils.setup_train_loop = setup_train_loop
    train_utils.create_training_optimizer = create_training_optimizer
    try:
        arguments = ["train", BASE, f"metrics_file={metrics}", *arguments]
        state = train.train_loop(*train.initialize(arguments))
    finally:
        train_utils.setup_train_loop = set_up
        train_utils.create_training_optimizer = make
        _muon.orthogonalize_shares = exchange
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "losses": [row["learning/loss"] for row in rows],
        "start": seen["start"],
        "end": digests(state.model),
        "kept": seen["kept"],
        "shares": seen["shares"],
        "params": placements(params_of(state.model)),
        "state": placements(state.optimizer.opt_state),
    }


def params_of(model):
    return nnx.split(model, nnx.Param, ...)[1]


def by_path(tree) -> list[tuple[str, jax.Array]]:
    """Boxes' contents by path; the box itself is no part of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.as_pure(tree))
    keystr = jax.tree_util.keystr
    return [(keystr(path, simple=True, separator="|"), leaf) for path, leaf in leaves]


def digests(model) -> dict[str, str]:
    arrays = [(path, np.asarray(leaf)) for path, leaf in by_path(params_of(model))]
    return {path: hashlib.sha256(x.tobytes()).hexdigest() for path, x in arrays}


def placements(tree) -> dict[str, dict]:
    return {
        path: {
            "shape": leaf.shape,
            "on_a_device": leaf.sharding.shard_shape(leaf.shape),
            "itemsize": leaf.dtype.itemsize,
            "memory": leaf.sharding.memory_kind,
        }
        for path, leaf in by_path(tree)
    }


def kept(tx, model) -> dict[str, dict]:
    params = nnx.state(model, nnx.Param)
    return {
        leaf.path: {"size": int(np.prod(leaf.shape)), "rank": leaf.rank}
        for leaf in lp.describe(tx, params).leaves
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
