"""What `matrices=None` selects, on leaves with the names of frameworks."""

import re
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorapre_jax as lp
from lorapre_jax._leaves.plan import FactoredLeaf

pytestmark = pytest.mark.usefixtures("nothing_was_said")

ENDS = lp.RankOne()
BLOCKS = lp.RotatedRankOne()


def tree(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns arrays for nested shapes, or Linen's boxes for `(shape, names)`."""
    nested: dict[str, Any] = {}
    for path, given in leaves.items():
        *keys, last = path.split("/")
        node = nested
        for key in keys:
            node = node.setdefault(key, {})
        shape, names = given if isinstance(given[0], tuple) else (given, None)
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        node[last] = leaf if names is None else nn.Partitioned(leaf, names)
    return nested


def found(leaves: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Path -> (batch, rows, columns, second moment) of the leaves that are factored."""
    tx = lp.scale_by_lorapre_adam(4, min_dim_size_to_factor=16, **options)
    state: Any = jax.eval_shape(tx.init, tree(leaves))
    return {
        leaf.path: (
            leaf.view.batch_axes,
            leaf.view.row_axes,
            leaf.view.column_axes,
            leaf.methods[1],
        )
        for leaf in state.plan.leaves
        if isinstance(leaf, FactoredLeaf)
    }


# Scanned on the second axis, as MaxText has its layers.
NAMED = {
    "layers/mlp/wi_0/kernel": ((64, 3, 128), ("embed", "layers", "mlp")),
    "layers/mlp/wo/kernel": ((128, 3, 64), ("mlp", "layers", "embed")),
    "layers/mlp/wi/kernel": (
        (64, 3, 2, 128),
        ("embed", "layers", "num_activations", "mlp"),
    ),
    "layers/attn/query/kernel": (
        (64, 3, 4, 16),
        ("embed_attn", "layers", "q_heads", "kv"),
    ),
    "layers/attn/out/kernel": (
        (4, 3, 16, 64),
        ("heads", "layers", "kv", "embed_attn"),
    ),
    "layers/attn/wkv_b/kernel": (
        (32, 3, 4, 16),
        ("kv_lora", "layers", "kv_heads", "kv_head_dim"),
    ),
    "layers/attn/query/bias": ((16, 3, 16), ("q_heads", "layers", "kv")),
    "layers/norm/scale": ((64, 32), ("norm", "layers")),
    "moe/wi_0": ((4, 3, 64, 128), ("exp", "moe_layers", "embed_moe", "mlp_moe")),
    "embedder/table": ((512, 64), ("vocab", "embed_vocab")),
    "logits/kernel": ((64, 512), ("embed_vocab", "vocab")),
}


def test_names_of_axes():
    assert found(NAMED) == {
        "layers/mlp/wi_0/kernel": ((1,), (0,), (2,), BLOCKS),
        "layers/mlp/wo/kernel": ((1,), (0,), (2,), BLOCKS),
        "layers/mlp/wi/kernel": ((1, 2), (0,), (3,), BLOCKS),
        "layers/attn/query/kernel": ((1,), (0,), (2, 3), BLOCKS),
        "layers/attn/out/kernel": ((1,), (0, 2), (3,), BLOCKS),
        "layers/attn/wkv_b/kernel": ((1,), (0,), (2, 3), BLOCKS),
        "moe/wi_0": ((0, 1), (2,), (3,), BLOCKS),
        "embedder/table": ((), (0,), (1,), ENDS),
        "logits/kernel": ((), (0,), (1,), ENDS),
    }


# Named by mesh axes, which say nothing of what an axis is, as in Tunix.
MESH = ("fsdp", "tp", None)
BY_PATH = {
    "layers/0/attn/q_proj/w": ((64, 4, 16), MESH),
    "layers/0/attn/o_proj/w": ((4, 16, 64), ("tp", None, "fsdp")),
    "layers/0/attn/q_einsum/w": ((4, 64, 16), ("tp", "fsdp", None)),
    "layers/0/attn/kv_einsum/w": ((2, 4, 64, 16), (None, "tp", "fsdp", None)),
    "layers/0/attn/attn_vec_einsum/w": ((4, 16, 64), ("tp", None, "fsdp")),
    "layers/0/mlp/gate_proj/kernel": ((64, 128), ("fsdp", "tp")),
    "layers/0/mlp/down_proj": ((4, 128, 64), ("fsdp", "tp", None)),
    "layers/0/input_layernorm/w": ((64,), ("tp",)),
    "embedder/input_embedding": ((512, 64), ("tp", "fsdp")),
    "lm_head/w": ((64, 512), ("fsdp", "tp")),
}


def test_paths():
    assert found(BY_PATH) == {
        "layers/0/attn/q_proj/w": ((), (0,), (1, 2), BLOCKS),
        "layers/0/attn/o_proj/w": ((), (0, 1), (2,), BLOCKS),
        "layers/0/attn/q_einsum/w": ((), (1,), (0, 2), BLOCKS),
        "layers/0/attn/kv_einsum/w": ((0,), (2,), (1, 3), BLOCKS),
        "layers/0/attn/attn_vec_einsum/w": ((), (0, 1), (2,), BLOCKS),
        "layers/0/mlp/gate_proj/kernel": ((), (0,), (1,), BLOCKS),
        "layers/0/mlp/down_proj": ((0,), (1,), (2,), BLOCKS),
        "embedder/input_embedding": ((), (0,), (1,), ENDS),
        "lm_head/w": ((), (0,), (1,), ENDS),
    }


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        # A stack below `layers`: its first axis is as long for all.
        (
            {"layers/attn/q/kernel": (3, 64, 64), "layers/norm/scale": (3, 64)},
            {"layers/attn/q/kernel": ((0,), (1,), (2,), BLOCKS)},
        ),
        # A stack by what all its leaves share.
        (
            {"attn/q": (3, 64, 64), "attn/o": (3, 64, 64), "mlp/up": (3, 64, 128)},
            {
                "attn/q": ((0,), (1,), (2,), BLOCKS),
                "attn/o": ((0,), (1,), (2,), BLOCKS),
                "mlp/up": ((0,), (1,), (2,), BLOCKS),
            },
        ),
        # One layer that is called so: a kernel of two axes is no stack of vectors.
        (
            {"layers/q/kernel": (64, 64), "layers/norm/scale": (64,)},
            {"layers/q/kernel": ((), (0,), (1,), BLOCKS)},
        ),
        (
            {"blocks_0/Attn_0/query/kernel": (64, 4, 16), "pos_embed/w": (32, 64)},
            {
                "blocks_0/Attn_0/query/kernel": ((), (0,), (1, 2), BLOCKS),
                "pos_embed/w": ((), (0,), (1,), ENDS),
            },
        ),
        (
            {"conv1/kernel": (3, 3, 32, 64), "stem/kernel": (5, 5, 32, 64)},
            {
                "conv1/kernel": ((), (0, 1, 2), (3,), BLOCKS),
                "stem/kernel": ((), (0, 1, 2), (3,), BLOCKS),
            },
        ),
        # A scanned block, whatever it is called, by its scales and biases.
        (
            {
                "encoderblock/mha/query/kernel": (6, 48, 4, 12),
                "encoderblock/mha/out/kernel": (6, 4, 12, 48),
                "encoderblock/mlp/fc/kernel": (6, 48, 96),
                "encoderblock/mlp/fc/bias": (6, 96),
                "head/kernel": (48, 100),
            },
            {
                "encoderblock/mha/query/kernel": ((0,), (1,), (2, 3), BLOCKS),
                "encoderblock/mha/out/kernel": ((0,), (1, 2), (3,), BLOCKS),
                "encoderblock/mlp/fc/kernel": ((0,), (1,), (2,), BLOCKS),
                "head/kernel": ((), (0,), (1,), ENDS),
            },
        ),
        # Lone leaves below a key such as `block` are no stack.
        (
            {
                "block/conv1/kernel": (3, 3, 32, 64),
                "block/conv2/kernel": (3, 3, 64, 64),
            },
            {
                "block/conv1/kernel": ((), (0, 1, 2), (3,), BLOCKS),
                "block/conv2/kernel": ((), (0, 1, 2), (3,), BLOCKS),
            },
        ),
        (
            {"layer/attn/query/kernel": (64, 4, 16), "up/kernel": (64, 128)},
            {
                "layer/attn/query/kernel": ((), (0,), (1, 2), BLOCKS),
                "up/kernel": ((), (0,), (1,), BLOCKS),
            },
        ),
        # Queries, keys and values behind the width.
        (
            {"attn/qkv_einsum/w": (64, 3, 4, 16), "up/w": (64, 128)},
            {
                "attn/qkv_einsum/w": ((1,), (0,), (2, 3), BLOCKS),
                "up/w": ((), (0,), (1,), BLOCKS),
            },
        ),
        # A norm is what holds the scale, not what stands around a kernel.
        (
            {
                "PreNorm_0/to_qkv/kernel": (64, 96),
                "norm1/linear/kernel": (64, 128),
                "LayerNormMLP_0/wo_kernel": (128, 64),
                "norm1/scale": (32, 64),
                "ln1/weight": (32, 64),
            },
            {
                "PreNorm_0/to_qkv/kernel": ((), (0,), (1,), BLOCKS),
                "norm1/linear/kernel": ((), (0,), (1,), BLOCKS),
                "LayerNormMLP_0/wo_kernel": ((), (0,), (1,), BLOCKS),
            },
        ),
        # The innermost names tell.
        (
            {
                "output_blocks_3/attn/query/kernel": (64, 4, 16),
                "conv_transformer/layer_0/attn/key/kernel": (64, 4, 16),
                "mha/out/kernel": (4, 16, 64),
            },
            {
                "output_blocks_3/attn/query/kernel": ((), (0,), (1, 2), BLOCKS),
                "conv_transformer/layer_0/attn/key/kernel": ((), (0,), (1, 2), BLOCKS),
                "mha/out/kernel": ((), (0, 1), (2,), BLOCKS),
            },
        ),
        (
            {"attn/out/kernel": ((4, 16, 64), ("heads", "kv", None))},
            {"attn/out/kernel": ((), (0, 1), (2,), BLOCKS)},
        ),
        # Patches, and an axis of one element.
        (
            {"embedding/kernel": (16, 16, 3, 48), "pos_embed": (1, 32, 48)},
            {
                "embedding/kernel": ((), (0, 1, 2), (3,), BLOCKS),
                "pos_embed": ((0,), (1,), (2,), BLOCKS),
            },
        ),
        # What repeats is no vocabulary, and neither is what attention or MLP hold.
        (
            {
                "layers_0/dt_proj/kernel": (16, 160),
                "layers_1/dt_proj/kernel": (16, 160),
                "mlp/shared/gate/kernel": (64, 32),
                "text_embedder/layers_0/attn/query/kernel": (64, 64),
                "layers_0/A_log": (160, 16),
            },
            {
                "layers_0/dt_proj/kernel": ((), (0,), (1,), BLOCKS),
                "layers_1/dt_proj/kernel": ((), (0,), (1,), BLOCKS),
                "mlp/shared/gate/kernel": ((), (0,), (1,), BLOCKS),
                "text_embedder/layers_0/attn/query/kernel": ((), (0,), (1,), BLOCKS),
            },
        ),
        (
            {"x": ((8, 96, 64), (None, "vocab", "embed"))},
            {"x": ((), (0, 1), (2,), ENDS)},
        ),
        # Haiku's transposed convolutions; Flax's have their outputs last.
        (
            {
                "net/~/conv2_d_transpose/w": (3, 3, 64, 32),
                "net/~/conv1_d_transpose_1/w": (5, 64, 32),
                "net/~/conv2_d/w": (3, 3, 32, 64),
                "ConvTranspose_0/kernel": (3, 3, 32, 64),
            },
            {
                "net/~/conv2_d_transpose/w": ((), (0, 1, 3), (2,), BLOCKS),
                "net/~/conv1_d_transpose_1/w": ((), (0, 2), (1,), BLOCKS),
                "net/~/conv2_d/w": ((), (0, 1, 2), (3,), BLOCKS),
                "ConvTranspose_0/kernel": ((), (0, 1, 2), (3,), BLOCKS),
            },
        ),
        # FlaxGPT2's kernels, outputs first, and those of a port of GPT-2.
        (
            {
                "h/0/attn/c_attn/kernel": (192, 64),
                "h/0/attn/c_proj/kernel": (64, 64),
                "h/0/mlp/c_fc/kernel": (256, 64),
                "h/0/mlp/c_proj/kernel": (64, 256),
                "wte/embedding": (500, 64),
            },
            {
                "h/0/attn/c_attn/kernel": ((), (1,), (0,), BLOCKS),
                "h/0/attn/c_proj/kernel": ((), (1,), (0,), BLOCKS),
                "h/0/mlp/c_fc/kernel": ((), (1,), (0,), BLOCKS),
                "h/0/mlp/c_proj/kernel": ((), (1,), (0,), BLOCKS),
                "wte/embedding": ((), (0,), (1,), ENDS),
            },
        ),
        (
            {
                "h/0/attn/c_attn/kernel": (64, 192),
                "h/0/attn/c_proj/kernel": (64, 64),
                "h/0/mlp/c_fc/kernel": (64, 256),
                "h/0/mlp/c_proj/kernel": (256, 64),
            },
            {
                "h/0/attn/c_attn/kernel": ((), (0,), (1,), BLOCKS),
                "h/0/attn/c_proj/kernel": ((), (0,), (1,), BLOCKS),
                "h/0/mlp/c_fc/kernel": ((), (0,), (1,), BLOCKS),
                "h/0/mlp/c_proj/kernel": ((), (0,), (1,), BLOCKS),
            },
        ),
        # Gemma's gates, either way round, alone and in a stack.
        (
            {
                "layer_0/mlp/gating_einsum/w": (2, 256, 64),
                "layer_1/mlp/gating_einsum/w": (2, 64, 256),
                "layer_0/mlp/linear/w": (256, 64),
                "layer_1/mlp/linear/w": (256, 64),
                "layer_0/attn/q_einsum/w": (4, 64, 16),
            },
            {
                "layer_0/mlp/gating_einsum/w": ((), (2,), (0, 1), BLOCKS),
                "layer_1/mlp/gating_einsum/w": ((), (1,), (0, 2), BLOCKS),
                "layer_0/mlp/linear/w": ((), (0,), (1,), BLOCKS),
                "layer_1/mlp/linear/w": ((), (0,), (1,), BLOCKS),
                "layer_0/attn/q_einsum/w": ((), (1,), (0, 2), BLOCKS),
            },
        ),
        (
            {
                "layers/mlp/gating_einsum": (3, 2, 256, 64),
                "layers/mlp/linear": (3, 256, 64),
                "layers/attn/q_einsum": (3, 4, 64, 16),
                "layers/norm/scale": (3, 64),
            },
            {
                "layers/mlp/gating_einsum": ((0,), (3,), (1, 2), BLOCKS),
                "layers/mlp/linear": ((0,), (1,), (2,), BLOCKS),
                "layers/attn/q_einsum": ((0,), (2,), (1, 3), BLOCKS),
            },
        ),
        # PyTorch's way round.
        ({"fc/weight": (128, 64)}, {"fc/weight": ((), (1,), (0,), BLOCKS)}),
        # Lists without names: what is far from square has a vocabulary.
        (
            {"0": (64, 128), "1": (64, 1024), "2": (1024, 64)},
            {
                "0": ((), (0,), (1,), BLOCKS),
                "1": ((), (0,), (1,), ENDS),
                "2": ((), (0,), (1,), ENDS),
            },
        ),
        # Heads of attention are no heads of a model.
        (
            {"attn/heads/kernel": (64, 64)},
            {"attn/heads/kernel": ((), (0,), (1,), BLOCKS)},
        ),
        ({"head/kernel": (64, 64)}, {"head/kernel": ((), (0,), (1,), ENDS)}),
    ],
)
def test_other_networks(leaves, expected):
    assert found(leaves) == expected


def test_heads_that_do_not_fit_the_width_are_not_guessed():
    leaves = {"attn/q": (3, 64, 64), "up": (64, 128), "down": (128, 64)}
    with pytest.warns(UserWarning, match="attn/q"):
        assert found(leaves).keys() == {"up", "down"}


def test_a_stack_of_which_nothing_is_known_is_named_with_the_code_to_paste():
    known = {"layers/q/kernel": (3, 64, 64), "layers/norm/scale": (3, 64)}
    leaves = known | {"a": (5, 64, 128), "b": (64, 64), "c": (3, 64)}
    with pytest.warns(UserWarning, match="neither their paths nor names") as caught:
        by_default = found(leaves)
    assert by_default.keys() == {"layers/q/kernel", "b"}
    (message,) = {str(warning.message) for warning in caught}
    code = re.search(r"matrices=(lp\.select_matrices\(.*\))", message, re.DOTALL)
    assert code is not None
    completed = code[1].replace("rows=..., columns=...", "rows=-2, columns=-1")
    matrices = eval(completed, {"lp": lp})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pasted = found(leaves, matrices=matrices)
    assert pasted == by_default | {"a": ((0,), (1,), (2,), BLOCKS)}


def test_what_is_not_known_is_said_once():
    """`describe` and similar functions call `init` again."""
    params = tree({"a": (5, 64, 128), "b": (64, 64)})
    tx = lp.scale_by_lorapre_adam(4, min_dim_size_to_factor=16)
    others = tree({"a": (7, 64, 128), "b": (64, 64)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(tx.init, params)
        lp.describe(tx, params)
        lp.rank_for_budget(10**9, params, min_dim_size_to_factor=16)
        lp.describe(tx, others)
    first, second = (str(warning.message) for warning in caught)
    assert "(5, 64, 128)" in first
    assert "(7, 64, 128)" in second


ALONE = {
    "embed/embedding": (500, 64),
    "attn/query/kernel": (64, 4, 16),
    "attn/query/bias": (4, 16),
    "attn/out/kernel": (4, 16, 64),
    "block/conv1/kernel": (3, 3, 64, 64),
    "block/conv1/bias": (64,),
    "mlp/gating_einsum": (2, 64, 128),
    "mlp/linear": (128, 64),
    "head/w": (64, 500),
}


@pytest.mark.parametrize("leaves", [NAMED, BY_PATH, ALONE])
def test_muon_gives_the_ends_to_adam(leaves):
    """Both parts of the alias decide the same, though neither sees all leaves."""
    tx = lp.lorapre_muon(0.1, 4, min_dim_size_to_factor=16)
    params = tree(leaves)
    report = lp.describe(tx, params)
    factored = {leaf.path: leaf for leaf in report.leaves if leaf.is_factored}
    whole = lp.describe(lp.scale_by_lorapre_adam(4, min_dim_size_to_factor=16), params)
    expected = {leaf.path: leaf for leaf in whole.leaves if leaf.is_factored}
    assert factored.keys() == expected.keys()
    for path, leaf in factored.items():
        is_end = expected[path].methods[1] == ENDS
        assert (len(leaf.methods) == 2) == is_end, path
        assert leaf.batch_shape == expected[path].batch_shape
        assert (leaf.p, leaf.q) == (expected[path].p, expected[path].q)


def test_muon_goes_on_without_the_names_it_began_with():
    """Flax's optimizers pass boxed parameters to `init`, and arrays afterwards."""
    leaves = {"a": ((3, 64, 128), ("layers", "embed", "mlp")), "b": ((64,), ("embed",))}
    boxed = jax.tree.map(lambda x: jnp.ones(x.shape), tree(leaves))
    tx = lp.lorapre_muon(0.1, 4, min_dim_size_to_factor=16)
    expected = tx.update(boxed, tx.init(boxed), boxed)
    plain: Any
    state: Any
    plain, state = nn.unbox((boxed, tx.init(boxed)))
    updates, state = tx.update(plain, state, plain)
    (leaf,) = state.inner_states["muon"].inner_state[0].plan.leaves
    assert isinstance(leaf, FactoredLeaf)
    jax.tree.map(np.testing.assert_array_equal, (updates, state), nn.unbox(expected))
    theirs = optax.contrib.muon(0.1).init(plain)
    for other, name in (
        (optax.scale_by_adam().init(plain), "ScaleByAdamState"),
        (theirs, "MuonState"),
    ):
        with pytest.raises(TypeError, match=f"update got a {name}"):
            tx.update(plain, other)


def test_what_extends_the_default():
    axes = {"pos_embed": lp.MatrixAxes(1, 0), "x": lp.MatrixAxes()}
    leaves = {"pos_embed/w": (32, 64), "x": (3, 64, 64), "head/kernel": (64, 512)}
    matrices = lp.select_matrices(axes=axes, exclude="^head", extend_default=True)
    assert found(leaves, matrices=matrices) == {
        "pos_embed/w": ((), (1,), (0,), ENDS),
        "x": ((0,), (1,), (2,), BLOCKS),
    }
    small = {"layers/q/kernel": (3, 15, 64), "x": (3, 12, 12), "pos_embed/w": (32, 64)}
    matrices = lp.select_matrices(axes=axes, extend_default=True)
    assert found(small, matrices=matrices).keys() == {"x", "pos_embed/w"}
    options: dict[str, Any]
    for options in ({"include": "x", "axes": axes}, {"axes": lp.MatrixAxes()}):
        with pytest.raises(ValueError, match="leaves no default"):
            lp.select_matrices(**options, extend_default=True)


def test_a_selection_by_hand_is_obeyed():
    matrices = lp.select_matrices(include="embedder", axes=lp.MatrixAxes(-1, -2))
    tx = lp.scale_by_lorapre_adam(4, matrices=matrices)
    state: Any = jax.eval_shape(tx.init, tree(NAMED))
    (leaf,) = (x for x in state.plan.leaves if isinstance(x, FactoredLeaf))
    assert (leaf.path, leaf.view.row_axes) == ("embedder/table", (1,))


def test_methods_by_pattern():
    second = {"mlp": lp.Dense(), "^embedder/": lp.RotatedRankOne()}
    tx = lp.scale_by_lorapre_adam(4, second_moment=second, min_dim_size_to_factor=16)
    state: Any = jax.eval_shape(tx.init, tree(NAMED))
    methods = {leaf.path: leaf.methods[1] for leaf in state.plan.leaves}
    assert methods["layers/mlp/wo/kernel"] == lp.Dense()
    assert methods["embedder/table"] == BLOCKS
    assert methods["logits/kernel"] == ENDS
    assert methods["layers/attn/out/kernel"] == BLOCKS
    assert set(state.nu_factors) < set(state.mu_factors)


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ({"nothing": lp.RankOne()}, ValueError, "pattern 'nothing' matches no leaf"),
        (
            {"mlp": lp.RankOne(), "wi_0": lp.Dense()},
            ValueError,
            "two patterns give leaf 'layers/mlp/wi_0/kernel' different methods",
        ),
        ({"(": lp.RankOne()}, ValueError, r"'\(' is not a regular expression"),
        ({3: lp.RankOne()}, TypeError, "regular expressions as keys, got 3"),
        ({"mlp": lp.RankOne}, TypeError, r"such as RankOne\(\), not the class"),
        ({"mlp": "rank one"}, TypeError, "'rank one' cannot keep a second moment"),
    ],
)
def test_methods_by_pattern_that_are_wrong(second, error, message):
    with pytest.raises(error, match=message):
        lp.scale_by_lorapre_adam(4, second_moment=second).init(tree(NAMED))


def test_methods_of_one_leaf_that_do_not_go_together():
    tx = lp.scale_by_lorapre_adam(
        4, first_moment={"mlp": lp.Dense()}, min_dim_size_to_factor=16
    )
    with pytest.raises(TypeError, match=r"Leaf 'layers/mlp/wi/kernel': `second_mom"):
        jax.eval_shape(tx.init, tree(NAMED))
