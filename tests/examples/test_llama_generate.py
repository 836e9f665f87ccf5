"""Generation: with and without the cache, in batches, and with the right odds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import layout
from examples.llama.config import ModelConfig
from examples.llama.generate import Sampling, choose, generate, nucleus
from examples.llama.pure import PureLlama

VOCAB = 40
STACKED = ModelConfig(
    width=32, ffn_width=48, num_layers=2, num_heads=4, num_kv_heads=2, rope_base=100.0
)
CONFIGS = {
    "stacked": STACKED,
    "unrolled": dataclasses.replace(
        STACKED, scan_layers=False, num_kv_heads=None, tie_embeddings=True
    ),
}
PROMPTS = [[5, 3, 8, 1, 1, 20, 31], [7], [2, 39, 4]]
NEW = 9


@functools.cache
def model_of(name):
    """Returns a model with weights so large that its probabilities are peaked."""
    model = PureLlama(CONFIGS[name], VOCAB)
    params = jax.jit(model.init)(jax.random.key(1))
    return model, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)


def logits_of(model, params, row):
    """Returns logits (16, v) of the row, padded with zeros, which change nothing."""
    padded = np.pad(row, (0, 16 - len(row)))
    return jax.jit(model.apply)(params, padded[None])[0]


def without_cache(model, params, prompt, new, stop=None):
    """Appends the likeliest token repeatedly, computing the whole row each time."""
    row = list(prompt)
    for _ in range(new):
        token = int(logits_of(model, params, row)[len(row) - 1].argmax())
        if token == stop:
            break
        row.append(token)
    return row[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_no_token(name):
    model, params = model_of(name)
    made = generate(model, params, PROMPTS, NEW)
    assert len({tuple(row) for row in made}) == len(PROMPTS)
    for prompt, row in zip(PROMPTS, made, strict=True):
        assert row.tolist() == without_cache(model, params, prompt, NEW)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_no_logit(name):
    """In parts of any size, and with any content in slots before a row's beginning."""
    model, params = model_of(name)
    rows = np.random.default_rng(0).integers(0, VOCAB, (2, 8))
    begin = jnp.asarray([0, 3])
    alone = [logits_of(model, params, rows[i, begin[i] :]) for i in range(2)]
    cache, done = model.empty_cache(begin, slots=10), 0
    for size in (5, 1, 2):
        part = rows[:, done : done + size]
        logits, cache = jax.jit(model.extend)(params, part, cache)
        done += size
        for i in range(2):
            expected = alone[i][done - 1 - begin[i]]
            np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_p": 0.9}])
def test_together_as_alone(sampling):
    """A row draws by its number, so alone it is as if it were the first row."""
    model, params = model_of("stacked")
    sampling = sampling | {"key": jax.random.key(3)}
    first, *_ = generate(model, params, PROMPTS[::-1], NEW, **sampling)
    (alone,) = generate(model, params, PROMPTS[-1:], NEW, **sampling)
    np.testing.assert_array_equal(first, alone)


def test_a_row_ends_at_the_end_of_text():
    model, params = model_of("stacked")
    made = generate(model, params, PROMPTS, NEW)
    stop = int(made[0][2])
    assert stop not in made[0][:2]
    unsaid = min(set(range(VOCAB)) - set(np.concatenate(made).tolist()))
    ended = generate(model, params, PROMPTS, NEW, end_of_text=(unsaid, stop))
    for prompt, row in zip(PROMPTS, ended, strict=True):
        assert row.tolist() == without_cache(model, params, prompt, NEW, stop)
    assert len(ended[0]) == 2
    assert {len(row) for row in ended} > {2}


def test_the_same_key_the_same_tokens():
    model, params = model_of("stacked")

    def draw(seed, temperature=1e3):  # every token is about as likely
        key = jax.random.key(seed)
        made = generate(model, params, [[1]] * 4, NEW, temperature=temperature, key=key)
        return np.stack(made)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    assert len(np.unique(draw(0), axis=0)) == 4  # rows draw by themselves
    assert len(np.unique(draw(0)[0])) > 4  # and so does every token of one
    (likeliest,) = generate(model, params, [[1]], NEW)
    np.testing.assert_array_equal(draw(0, 1e-4), np.stack([likeliest] * 4))


def fewest(probabilities, top_p):
    """Computes the nucleus in NumPy, one token after the other."""
    kept, mass = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        kept.add(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.31, 0.75, 0.999])
def test_the_nucleus_is_the_fewest_that_reach_p(top_p):
    logits = np.random.default_rng(0).normal(size=(20, 50)) * 3
    logits[0], logits[1, :4] = 0.0, 9.0  # equally likely ones
    kept = np.asarray(nucleus(jnp.asarray(logits, jnp.float32), top_p))
    for row, mask in zip(logits, kept, strict=True):
        odds = np.exp(row - row.max())
        assert set(np.flatnonzero(mask)) == fewest(odds / odds.sum(), top_p)


def test_tokens_are_drawn_by_the_odds():
    """With 20,000 draws, at temperature 2 and within a nucleus."""
    odds = np.asarray([0.45, 0.3, 0.15, 0.06, 0.04])
    logits = np.broadcast_to(2 * np.log(odds), (20_000, 5)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = choose(jnp.asarray(logits), keys, Sampling(temperature=2.0, top_p=0.8))
    found = np.bincount(drawn, minlength=5) / 20_000
    np.testing.assert_allclose(found, [0.5, 1 / 3, 1 / 6, 0, 0], atol=0.015)


def test_from_a_divided_state():
    """Three rows cannot be sharded evenly over eight devices."""
    mesh = layout.make_mesh("data=2,fsdp=2,tensor=2", jax.devices())
    model, params = model_of("stacked")
    expected = generate(model, params, PROMPTS, NEW)
    params = jax.device_put(params, layout.param_shardings(mesh, params))
    made = generate(PureLlama(STACKED, VOCAB, mesh), params, PROMPTS, NEW)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_one_program_for_all_tokens():
    model, params = model_of("stacked")
    expected = generate(model, params, PROMPTS, NEW)
    traced, extend = [], model.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "extend", lambda *x: traced.append(x) or extend(*x))
        made = generate(model, params, PROMPTS[::-1], NEW)
        assert not traced
        generate(model, params, PROMPTS, NEW + 1)
        assert len(traced) == 2  # of the prompts, and of all tokens after them
    jax.tree.map(np.testing.assert_array_equal, made, expected[::-1])


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, r"prompt 1 is of shape \(0,\)"),
        ([[1, 40]], {}, "prompt 0 has tokens from 1 to 40; the model knows 0 to 39"),
        ([[1]], {"temperature": 1.0}, "give a key"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0 or a number above"),
        ([[1]], {"temperature": math.nan}, "temperature must be 0 or a number above"),
        ([[1]], {"temperature": math.inf}, "temperature must be 0 or a number above"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_what_cannot_go_on_is_refused(prompts, settings, message):
    model, params = model_of("stacked")
    settings = {"max_new_tokens": 2} | settings
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, **settings)
