"""Meshes from text, and how they shard the published models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples.llama import layout
from examples.llama.config import PRESETS, Config, ModelConfig
from examples.llama.pure import PureLlama

# Parameters with 32,000 tokens; the names of the models round them freely.
MILLIONS = {"60m": 58, "130m": 134, "350m": 368, "1b": 1339, "7b": 6738}


def specs(preset, mesh):
    """Returns specs by path, and exceptions, of a preset on eight devices."""
    model = PureLlama(PRESETS[preset], 32_000)
    params = jax.eval_shape(model.init, jax.random.key(0))
    mesh = layout.make_mesh(mesh, jax.devices())
    placed = jax.tree.leaves_with_path(layout.param_shardings(mesh, params))
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in placed
    }
    return by_path, layout.exceptions(mesh, params)


@pytest.mark.parametrize("preset", MILLIONS)
def test_presets_have_the_size_of_their_names(preset):
    model = PureLlama(PRESETS[preset], 32_000)
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6) == MILLIONS[preset]


def test_a_layout_divides_both_axes():
    found, exceptions = specs("350m", "fsdp=4,tensor=2")
    assert not exceptions
    assert found["embed/embedding"] == P("tensor", "fsdp")
    assert found["head/kernel"] == P("fsdp", "tensor")
    assert found["layers/attention/q/kernel"] == P(None, "fsdp", "tensor")
    assert found["layers/attention/o/kernel"] == P(None, "tensor", "fsdp")
    assert found["layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert found["layers/mlp_norm/scale"] == P(None, None)


def test_5461_is_left_whole_and_said_so():
    found, exceptions = specs("1b", "fsdp=4,tensor=2")
    assert found["layers/mlp/up/kernel"] == P(None, ("fsdp", "tensor"), None)
    assert found["layers/mlp/down/kernel"] == P(None, None, ("fsdp", "tensor"))
    assert len(exceptions) == 3
    assert "layers/mlp/up/kernel (24, 2048, 5461) is sharded as" in "".join(exceptions)


def constrained(x, *axes, mesh="fsdp=4,tensor=2"):
    devices = layout.make_mesh(mesh, jax.devices())

    def fn(x):
        with layout.use(devices):
            return layout.constrain(x, *axes)

    x = jax.device_put(x, layout.replicated(devices))
    return jax.jit(fn)(x).sharding


def test_activations_follow_the_table():
    x = jnp.zeros((8, 3, 4, 5))
    rows = constrained(x, "batch", None, "heads", None)
    assert rows.shard_shape(x.shape) == (2, 3, 2, 5)
    rows = constrained(x, "batch", None, None, None, mesh="data=2,fsdp=4")
    assert rows.shard_shape(x.shape) == (1, 3, 4, 5)
    three_heads = constrained(x, "batch", "heads", None, None)
    assert three_heads.shard_shape(x.shape) == (2, 3, 4, 5)
    assert layout.constrain(x, "batch", None, None, None) is x


@pytest.mark.parametrize("loss_chunk", [None, 5])
def test_no_device_holds_the_whole_batch(loss_chunk):
    """Except for the output of the sharded embedding, before it is sent to the rows."""
    rows, length = 8, 15
    config = ModelConfig(width=64, ffn_width=96, num_layers=2, loss_chunk=loss_chunk)
    tokens = np.zeros((rows, length + 1), np.int32)

    def program(mesh, constrained):
        model = PureLlama(config, 48, mesh if constrained else None)

        def loss(params, tokens):
            return model.losses(params, tokens[:, :-1], tokens[:, 1:]).mean()

        abstract = jax.eval_shape(model.init, jax.random.key(0))
        places = layout.param_shardings(mesh, abstract), layout.by_row(mesh, rows)
        step = jax.jit(jax.grad(loss), in_shardings=places, out_shardings=places[0])
        return step.lower(abstract, tokens).compile().as_text() or ""

    def largest(text):
        """Returns the elements per token of the largest array with all tokens."""
        whole = rf"f32\[(?:{rows},{length}|{rows * length})((?:,\d+)*)\]"
        found = re.findall(whole, text)
        return max(np.prod([int(n) for n in x.split(",")[1:]]) for x in ["", *found])

    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    found = config.width // mesh.shape["fsdp"]
    assert largest(program(mesh, constrained=True)) <= found
    assert largest(program(mesh, constrained=False)) > found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp", "'fsdp' is not one of data=N, fsdp=N, tensor=N"),
        ("model=2", "'model=2' is not one of"),
        ("fsdp=0", "N at least 1"),
    ],
)
def test_a_bad_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Config(mesh=text)


def test_a_mesh_has_all_devices():
    assert layout.make_mesh(None, jax.devices()).shape["data"] == 8
    with pytest.raises(ValueError, match="takes 4 devices, but there are 8"):
        layout.make_mesh("fsdp=2,tensor=2", jax.devices())
