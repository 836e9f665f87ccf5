"""Factors come back in boxes of their parameter's kind, named by its axes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_cases import assert_close, plan_of, random_tree, run
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_jax as lp

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("layers", "embed", "heads", None)
SHAPES = {"w": (2, 12, 4, 3), "bias": (12,)}
MATRICES = lp.select_matrices("^w$", axes=lp.MatrixAxes(rows=1, columns=(2, 3)))
TX = lp.scale_by_lorapre_adam(2, matrices=MATRICES)
EXPECTED = {
    "left": ("layers", "embed", None),
    "right": ("layers", "heads", None, None),
    "row": ("layers", "embed"),
    "column": ("layers", "heads", None),
    "direction": ("layers", None),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """A box of no known framework."""

    array: Any
    names: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})


@pytest.fixture(autouse=True, scope="module")
def named_is_registered():
    lp.register_box(
        Named,
        lambda box: box.names,
        lambda box, array, axes: Named(
            array, tuple(None if i is None else box.names[i] for i in axes)
        ),
    )


class Kind(NamedTuple):
    """A kind of box: how to make one, and how to read its names."""

    box: Callable[[Any, Any], Any]
    names: Callable[[Any], Any]


def mesh() -> Any:
    return jax.make_mesh(
        (2, 1, 2), ("layers", "embed", "heads"), (AxisType.Auto,) * 3,
        devices=jax.devices()[:4],
    )  # fmt: skip


KINDS = {
    "Partitioned": Kind(nn.Partitioned, lambda box: box.names),
    "LogicallyPartitioned": Kind(
        lambda x, names: nn.LogicallyPartitioned(x, names, rules=(("embed", "x"),)),
        lambda box: box.names if box.rules == (("embed", "x"),) else "lost its rules",
    ),
    "Variable": Kind(
        lambda x, names: nnx.Param(x, out_sharding=names, eager_sharding=False),
        lambda box: box.out_sharding,
    ),
    "Variable, of a spec": Kind(
        lambda x, names: nnx.Param(x, out_sharding=P(*names), eager_sharding=False),
        lambda box: tuple(box.out_sharding),
    ),
    "Variable, placed": Kind(
        lambda x, names: nnx.Param(
            x, out_sharding=NamedSharding(mesh(), P(*names)), eager_sharding=False
        ),
        lambda box: tuple(box.out_sharding.spec),
    ),
    "registered": Kind(Named, lambda box: box.names),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def boxed(kind: Kind, seed: int = 0) -> dict[str, Any]:
    tree = random_tree(SHAPES, seed)
    names = {"w": NAMES, "bias": ("embed",)}
    return {name: kind.box(tree[name], names[name]) for name in tree}


def arrays(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def test_names_of_factors(kind):
    state: Any = TX.init(boxed(kind))
    found = {
        field: box
        for factors in (state.mu_factors["w"], state.nu_factors["w"])
        for field, box in factors._asdict().items()
    }
    assert {field: kind.names(box) for field, box in found.items()} == EXPECTED
    for field, box in found.items():
        assert type(box) is type(boxed(kind)["w"])
        (array,) = arrays(box)
        assert array.ndim == len(EXPECTED[field])
    # A moment that is not there takes the box with it; one that is there has it.
    assert state.mu["w"] == optax.MaskedNode()
    assert kind.names(state.mu["bias"]) == ("embed",)
    assert [leaf.path for leaf in state.plan.leaves] == ["bias", "w"]


def test_boxes_change_no_number(kind):
    params, *grads = (boxed(kind, seed) for seed in range(4))
    updates, state = run(TX, params, grads)
    plain = [random_tree(SHAPES, seed) for seed in range(4)]
    expected, expected_state = run(TX, plain[0], plain[1:])
    assert jax.tree.structure(updates[-1]) == jax.tree.structure(params)
    assert jax.tree.structure(state) == jax.tree.structure(TX.init(params))
    assert plan_of(state) == plan_of(expected_state)
    assert_close(arrays(updates), arrays(expected))
    assert_close(arrays(state), arrays(expected_state))


def test_what_is_asked_of_a_boxed_state(kind):
    params, grads = boxed(kind), boxed(kind, 1)
    _, state = run(TX, params, [grads])
    plain, plain_grads = random_tree(SHAPES), random_tree(SHAPES, 1)
    _, plain_state = run(TX, plain, [plain_grads])
    assert lp.state_record(state) == lp.state_record(plain_state)
    assert_close(
        lp.diagnostics(state, boxed(kind, 2)),
        lp.diagnostics(plain_state, random_tree(SHAPES, 2)),
    )
    report = lp.describe(TX, params, state)
    assert report.device_bytes == report.total_bytes
    assert lp.describe(TX, params).leaves == lp.describe(TX, plain).leaves
    places = lp.state_sharding(TX, params)
    assert jax.tree.structure(places) == jax.tree.structure(state)

    smaller = lp.scale_by_lorapre_adam(1, matrices=MATRICES)
    converted = lp.convert_state(state, smaller, params)
    assert jax.tree.structure(converted) == jax.tree.structure(smaller.init(params))
    expected = lp.convert_state(plain_state, smaller, plain)
    assert_close(arrays(converted), arrays(expected), rtol=1e-4)
    dense = lp.convert_state(converted, optax.scale_by_adam(), params, b1=0.9, b2=0.95)
    wanted = lp.convert_state(expected, optax.scale_by_adam(), plain, b1=0.9, b2=0.95)
    assert_close(arrays(dense), arrays(wanted), rtol=1e-4)


def test_an_nnx_state_of_any_order():
    """Paths are compared, whether or not there are boxes in the state."""

    class Net(nnx.Module):
        def __init__(self):
            init = nnx.with_partitioning(nnx.initializers.ones, ("x", "y"))
            rngs = nnx.Rngs(0)
            self.up = nnx.Linear(16, 32, kernel_init=init, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)

    with jax.set_mesh(jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])):
        model = Net()
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    tx = lp.scale_by_lorapre_adam(2, min_dim_size_to_factor=8)
    params = nnx.state(model, nnx.Param)
    backwards = nnx.State(dict(reversed(nnx.to_pure_dict(params).items())))
    reports = [
        lp.describe(tx, tree)
        for tree in (params, backwards, nnx.to_pure_dict(params), nnx.as_pure(params))
    ]
    rows = [{leaf.path: leaf for leaf in report.leaves} for report in reports]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert rows[0]["up/kernel"].is_factored
    adam = lp.describe(optax.adam(0.1), params, nnx.state(optimizer))
    assert adam.leaves[-1].path == "up/kernel"
    assert adam.leaves[-1].device_nbytes == adam.leaves[-1].nbytes // 4
    places = lp.state_sharding(tx, params)
    assert places.mu_factors["up/kernel"].right.get_value().spec == P("y", None)


def test_layers_that_maxtext_scans():
    """MaxText scans along the second axis, and looks for that axis's name there."""
    layers = {nnx.PARTITION_NAME: "layers", "param_scan_axis": 1}
    names = ("embed", "layers", "mlp")
    named = {"out_sharding": names, "sharding_names": names}
    param = nnx.Param.from_metadata(
        jnp.ones((12, 2, 8)),
        nnx.Param(0, eager_sharding=False).get_metadata() | named | layers,
    )
    axes = lp.MatrixAxes(rows=0, columns=2)
    state: Any = lp.scale_by_lorapre_adam(2, matrices=axes).init({"w": param})
    left, right = state.mu_factors["w"]
    for box, own in ((left, "embed"), (right, "mlp")):
        metadata = box.get_metadata()
        for key in named:
            assert metadata[key] == ("layers", own, None)
        assert metadata["param_scan_axis"] == 0
        assert metadata[nnx.PARTITION_NAME] == "layers"
        assert metadata["eager_sharding"] is False


def test_metadata_that_names_no_axes():
    param = nnx.Param(jnp.ones((12, 8)), eager_sharding=False)
    param.set_metadata(out_sharding=object())
    with pytest.raises(TypeError, match="Leaf 'w': its sharding metadata is a object"):
        lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes()).init({"w": param})
    with pytest.raises(TypeError, match="`kind` must be a class, got 3"):
        lp.register_box(3, lambda box: None, lambda *_: None)  # pyright: ignore


def test_a_variable_of_several_arrays_is_no_box():
    """Its arrays are separate leaves, as for `jax.tree`."""
    params = {"w": nnx.Param({"a": jnp.ones((12, 8)), "b": jnp.ones(8)})}
    state: Any = lp.scale_by_lorapre_adam(2, matrices=lp.MatrixAxes()).init(params)
    assert len(state.mu_factors) == 1
    assert isinstance(state.mu_factors["w/value/a"].left, jax.Array)
    np.testing.assert_array_equal(arrays(state.mu), [np.zeros(8)])
