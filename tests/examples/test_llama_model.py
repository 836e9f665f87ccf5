"""The Llama: parameter tree, values against NumPy, causality, scan, grouped heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.config import ModelConfig
from examples.llama.pure import PureLlama

VOCAB = 40
CONFIG = ModelConfig(width=32, ffn_width=48, num_layers=2, num_heads=4, num_kv_heads=2)
UNROLLED = dataclasses.replace(CONFIG, scan_layers=False)
# Far from the defaults, where each of them shows.
PRETRAINED = {"tie_embeddings": True, "norm_eps": 0.3, "rope_base": 50.0}


def params_of(config, scale=10.0):
    """Returns larger initial weights, so that no part of the model is negligible."""
    params = jax.jit(PureLlama(config, VOCAB).init)(jax.random.key(1))
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


def stacked(unrolled):
    layers = [unrolled["layers"][i] for i in range(len(unrolled["layers"]))]
    return unrolled | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def shapes(config):
    model = PureLlama(config, VOCAB)
    leaves = jax.tree.leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }


BLOCK = {
    "attention/q/kernel": (32, 32),
    "attention/k/kernel": (32, 16),
    "attention/v/kernel": (32, 16),
    "attention/o/kernel": (32, 32),
    "mlp/gate/kernel": (32, 48),
    "mlp/up/kernel": (32, 48),
    "mlp/down/kernel": (48, 32),
    "attention_norm/scale": (32,),
    "mlp_norm/scale": (32,),
}
ENDS = {
    "embed/embedding": (VOCAB, 32),
    "norm/scale": (32,),
    "head/kernel": (32, VOCAB),
}


def test_parameter_paths_and_shapes():
    scanned = {f"layers/{name}": (2, *shape) for name, shape in BLOCK.items()}
    assert shapes(CONFIG) == scanned | ENDS
    unrolled = {
        f"layers/{i}/{name}": shape for i in range(2) for name, shape in BLOCK.items()
    }
    assert shapes(UNROLLED) == unrolled | ENDS
    tied = {name: shape for name, shape in ENDS.items() if name != "head/kernel"}
    assert shapes(dataclasses.replace(CONFIG, **PRETRAINED)) == scanned | tied


@pytest.mark.parametrize("config", [CONFIG, UNROLLED])
def test_initial_weights(config):
    params = params_of(config, scale=1.0)
    for path, leaf in jax.tree.leaves_with_path(params):
        assert leaf.dtype == jnp.float32
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("scale"):
            assert (leaf == 1).all()
        else:
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)
    if config.scan_layers:  # each layer has weights of its own
        first, second = params["layers"]["mlp"]["up"]["kernel"]
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("changes", [{}, PRETRAINED])
def test_scanned_equals_unrolled_equals_numpy(numpy_logits, changes):
    config = dataclasses.replace(UNROLLED, **changes)
    scanning = dataclasses.replace(CONFIG, **changes)
    params = params_of(config)
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, VOCAB)
    with jax.numpy_dtype_promotion("strict"):
        unrolled = jax.jit(PureLlama(config, VOCAB).apply)(params, tokens)
        scanned = jax.jit(PureLlama(scanning, VOCAB).apply)(stacked(params), tokens)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)
    plain = jax.tree.map(np.asarray, params)
    for row, logits in zip(np.asarray(tokens), unrolled, strict=True):
        expected = numpy_logits(plain, row, config)
        assert expected.std() > 0.1
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_no_logit_depends_on_a_later_token():
    tokens = jnp.arange(8)[None]  # all different, so embedding row = position
    model, params = PureLlama(CONFIG, VOCAB), params_of(CONFIG, scale=4.0)

    def logits_of(embedding):
        changed = params | {"embed": {"embedding": embedding}}
        return (model.apply(changed, tokens)[0] ** 2).sum(-1)

    jacobian = jax.jit(jax.jacrev(logits_of))(params["embed"]["embedding"])
    influence = np.abs(jacobian[:, :8]).sum(-1)  # [t, s]: of token s on logits t
    assert (influence[np.triu_indices(8, 1)] == 0).all()
    assert (influence[np.tril_indices(8)] > 0).all()


def test_grouped_heads_share_keys_and_values():
    grouped = params_of(CONFIG)
    attention = dict(grouped["layers"]["attention"])
    for name in "kv":  # (l, d, k e) -> every kv head twice in a row
        heads = attention[name]["kernel"].reshape(2, 32, 2, 8)
        attention[name] = {"kernel": jnp.repeat(heads, 2, axis=2).reshape(2, 32, 32)}
    full = grouped | {"layers": grouped["layers"] | {"attention": attention}}
    tokens = jnp.arange(12)[None]
    expected = PureLlama(CONFIG, VOCAB).apply(grouped, tokens)
    for kv_heads in (4, None):
        config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads)
        actual = PureLlama(config, VOCAB).apply(full, tokens)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_changes_activations_only():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params, tokens = params_of(config, scale=3.0), jnp.arange(12)[None]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = PureLlama(config, VOCAB).apply(params, tokens)
    full = PureLlama(CONFIG, VOCAB).apply(params, tokens)
    assert half.dtype == jnp.float32
    error = float(jnp.abs(half - full).max() / jnp.abs(full).max())
    assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"width": 30},
            "`model.width` .30. must be a multiple of `model.num_heads` .4.",
        ),
        ({"width": 36, "num_heads": 4}, "even number of features"),
        ({"num_kv_heads": 3}, "multiple of `model.num_kv_heads` .3."),
        ({"num_layers": 0}, "`model.num_layers` must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "`model.num_kv_heads` must be at least 1, got 0"),
        ({"norm_eps": -1e-6}, "`model.norm_eps` must be >= 0, got -1e-06"),
        ({"rope_base": 0.0}, "`model.rope_base` must be > 0, got 0.0"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    "changes", [{"remat": "all"}, {"remat": "all but products"}, {"loss_chunk": 3}]
)
def test_what_saves_memory_changes_no_gradient(changes, scan_layers):
    plain = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 7))

    def gradient(config):
        model = PureLlama(config, VOCAB)

        def loss(params):
            return model.losses(params, tokens[:, :-1], tokens[:, 1:]).mean()

        return jax.jit(jax.value_and_grad(loss))

    params = params_of(plain)
    saving = gradient(dataclasses.replace(plain, **changes))
    expected, actual = gradient(plain)(params), saving(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        actual,
        expected,
    )
    text = str(saving.trace(params).jaxpr)
    assert ("remat" if "remat" in changes else f"f32[2,3,{VOCAB}]") in text
    assert (f"f32[2,6,{VOCAB}]" in text) == ("remat" in changes)
