"""Orbax restores parameters, factored state and data position on another mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from contract_cases import assert_close, assert_same, random_tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"heads": (16, 8, 4), "stack": (8, 16, 32), "bias": (8,)}
MATRICES = lp.select_matrices(
    axes={"^heads$": lp.MatrixAxes(0, (1, 2)), "^stack$": lp.MatrixAxes()}
)
SPECS = {
    "fsdp": {"heads": P("x"), "stack": P(None, "x"), "bias": P()},
    "tensor": {"heads": P(None, "x"), "stack": P(None, None, "x"), "bias": P()},
}
GRADIENTS = random_tree({leaf: (9, *shape) for leaf, shape in SHAPES.items()}, seed=1)
JOURNEY = [("fsdp", 4), ("fsdp", 1), ("fsdp", 8), ("tensor", 8)]
OPTIMIZERS = {
    "adam": lp.lorapre_adamw(optax.linear_schedule(0.1, 0, 9), 3, matrices=MATRICES),
    "muon": lp.lorapre_muon(optax.linear_schedule(0.1, 0, 9), 3, matrices=MATRICES),
}


class Run(NamedTuple):
    """Everything that a checkpoint has."""

    params: Any
    opt_state: Any
    position: Any  # () int32, batches taken


@functools.cache
def make_optimizer(name: str) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name])


def take_step(name: str, run: Run) -> Run:
    """The position decides the gradients, as it decides the batch of a real run."""
    grads = {leaf: jnp.asarray(x)[run.position] for leaf, x in GRADIENTS.items()}
    updates, opt_state = make_optimizer(name).update(grads, run.opt_state, run.params)
    params = optax.apply_updates(run.params, updates)
    return Run(params, opt_state, run.position + 1)


@functools.cache
def abstract_run(name: str, layout: str, devices: int) -> Run:
    """Returns shapes, dtypes and shardings of a run."""
    mesh = jax.make_mesh(
        (devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    tx = make_optimizer(name)
    params = {
        leaf: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[layout][leaf])
        )
        for leaf, shape in SHAPES.items()
    }
    state = place(jax.eval_shape(tx.init, params), lp.state_sharding(tx, params))
    position = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return Run(params, state, position)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


@functools.cache
def unsharded_runs(name: str) -> tuple[Run, Run]:
    """Returns runs after three steps, when all factors are full, and after four."""
    params = random_tree(SHAPES)
    run = Run(params, make_optimizer(name).init(params), jnp.zeros((), jnp.int32))
    step = jax.jit(functools.partial(take_step, name))
    for _ in range(3):
        run = step(run)
    return run, step(run)


def by_checkpointer(folder, run: Run, abstract: Run) -> Run:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, run)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, abstract)


def by_manager_in_the_background(folder, run: Run, abstract: Run) -> Run:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(run))
        manager.wait_until_finished()
        return manager.restore(3, args=ocp.args.StandardRestore(abstract))


@pytest.mark.parametrize("travel", [by_checkpointer, by_manager_in_the_background])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_mesh_to_mesh(name, travel, tmp_path):
    """8 devices -> 4 -> 1 -> 8, then FSDP -> tensor parallel."""
    saved, expected = unsharded_runs(name)
    run = jax.device_put(saved, shardings_of(abstract_run(name, "fsdp", 8)))
    for layout, devices in JOURNEY:
        abstract = abstract_run(name, layout, devices)
        run = travel(tmp_path / f"{layout}{devices}", run, abstract)
        assert_same(run, saved)
        assert_lies(run, abstract)
    places = shardings_of(abstract)
    after = jax.jit(functools.partial(take_step, name), out_shardings=places)(run)
    assert_lies(after, abstract)
    assert_close(after, expected, rtol=1e-3, atol=2e-5)
    assert after.position == 4


def assert_lies(tree: Any, abstract: Any) -> None:
    for x, place in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings_of(abstract)), strict=True
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim), (x.sharding, place)
