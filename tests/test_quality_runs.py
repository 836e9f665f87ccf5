"""Runs of the race in benchmarks/quality, at a tiny size."""

import dataclasses
import itertools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import lorapre_jax as lp
from benchmarks.quality import scales
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.quality.conditions import CONDITIONS, Condition
from benchmarks.quality.methods import METHODS, ours
from benchmarks.quality.rules import Method, adam, stacked
from benchmarks.quality.run import Race, group_of
from benchmarks.quality.scales import SCALES, Texts
from examples.llama.config import ModelConfig
from examples.llama.data.batches import train_batches
from examples.llama.data.rows import PackedRows, held_out_batches


def test_stacking_changes_no_update(quick_compilation):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (12, 8), "b": (8, 12), "c": (12, 8)}
    grads = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    axes = lp.MatrixAxes(rows=-2, columns=-1)
    plain = lp.scale_by_lorapre_adam(2, matrices=axes)
    together = stacked(plain)
    update, update_together = jax.jit(plain.update), jax.jit(together.update)
    states = plain.init(grads), together.init(grads)
    for _ in range(2):
        one, first = update(grads, states[0])
        two, second = update_together(grads, states[1])
        states = first, second
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-3), one, two)


def tiny_race(method=None, condition=Condition()):  # noqa: B008 (frozen)
    scale = dataclasses.replace(
        SCALES["a"],
        model=ModelConfig(
            width=16, ffn_width=24, num_layers=1, num_heads=2, scan_layers=False
        ),
        batch_size=2,
        seq_len=8,
    )
    tokens = np.random.default_rng(0).integers(0, 16, 400)
    texts = Texts(tokens, {"near": tokens[:65], "far": tokens[65:130]}, 16)
    return Race(scale, method or Method(adam, ()), condition, texts)


def test_adam_in_the_race_is_optax_adam(quick_compilation):
    race = tiny_race()
    state = race.init(0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, b2=0.95))
    params, opt_state = state.params, tx.init(state.params)
    rates = dict.fromkeys(race.rules, np.float32(1e-2))
    apply, update = jax.jit(race.apply), jax.jit(tx.update)
    for t in range(5):
        grads = jax.tree.map(lambda x, t=t: jnp.sin(100 * x + 10 * t), params)
        updates, opt_state = update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        state = apply(state, race.condition.alter(grads, state.step), rates)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), state.params, params)


def test_a_run_of_ours_is_factored_and_says_what_it_cost(quick_compilation):
    result = tiny_race(Method(ours(8), ())).run(1e-3, 1e-3, seed=0, steps=6)
    assert np.isfinite(result["loss"])
    assert [step for step, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
    assert set(result["other_losses"]) == {"far"}
    # Rank 2: three numbers per row and column, of 4 (16, 16) and 3 (16, 24), and two.
    of_matrices = 4 * (3 * 32 + 2) + 3 * (3 * 40 + 2)
    assert result["state_bytes"]["matrices"] == 4 * of_matrices + 4
    assert result["params"]["matrices"] == 4 * 16 * 16 + 3 * 16 * 24
    assert group_of("layers/0/mlp/up/kernel") == "matrices"


def test_a_run_that_diverges_ends_without_a_loss(quick_compilation):
    result = tiny_race().run(math.inf, 1e-3, seed=0, steps=6)
    assert result["loss"] is None
    assert result["curve"] == []


def test_a_scaled_loss_only_scales_gradients(quick_compilation):
    scaled = tiny_race(condition=Condition(loss_scale=1e6, clip_norm=None))
    state = scaled.init(0)
    batch = held_out(scaled)
    loss, grads = scaled.gradient(state.params, batch)
    plain, before = tiny_race().gradient(state.params, batch)
    assert_allclose(loss, 1e6 * plain, rtol=1e-5)
    jax.tree.map(lambda a, b: assert_allclose(a, 1e6 * b, rtol=1e-3), grads, before)
    rates = dict.fromkeys(scaled.rules, np.float32(0))
    assert_allclose(scaled.train_step(state, batch, rates)[1], plain, rtol=1e-5)


def held_out(race):
    """Returns a held-out batch."""
    return next(iter(held_out_batches(PackedRows(race.texts.train, 8, pad=0), 2)))


def test_bfloat16_parameters_stay_so_and_their_rules_see_float32(quick_compilation):
    race = tiny_race(condition=Condition(param_dtype="bfloat16"))
    state = race.init(0)
    rates = dict.fromkeys(race.rules, np.float32(1e-3))
    state, loss = race.train_step(state, held_out(race), rates)
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("bfloat16")}
    moments = jax.tree.leaves(state.rules["matrices"])
    assert {leaf.dtype for leaf in moments if leaf.ndim} == {jnp.dtype("float32")}
    assert np.isfinite(loss)


def test_a_condition_may_have_smaller_batches(quick_compilation, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "benchmarks.quality.run.train_batches",
        lambda rows, size, seed: sizes.append(size) or train_batches(rows, size, seed),
    )
    tiny_race(condition=Condition(rows=1)).run(1e-3, 1e-3, seed=0, steps=1)
    assert sizes == [1]


def test_no_document_is_in_both_splits(tmp_path, monkeypatch):
    """Every document consists of a letter of its own."""
    letters = iter(string.ascii_letters)
    found = {}

    def read_texts(folder, split):
        where = folder.name, split
        return found.setdefault(where, list(itertools.islice(letters, 8)))

    monkeypatch.setattr(scales, "read_texts", read_texts)
    chosen, reported = (
        scales.load_texts(SCALES["a"], tmp_path, split, tmp_path)
        for split in ("choose", "report")
    )
    assert list(chosen.held_out) == ["c4", "text"]
    assert chosen.digest != reported.digest
    streams = [
        tokens
        for texts in (chosen, reported)
        for tokens in (texts.train, *texts.held_out.values())
    ]
    for one, other in itertools.combinations(streams, 2):
        assert len(set(one) & set(other)) == 1  # What ends a document.


def test_conditions_alter_the_gradient_as_they_say():
    name = "layers/0/mlp/up/kernel"
    grads = {name: jax.random.normal(jax.random.key(0), (20, 16))}
    spiked = CONDITIONS["spikes of 1e3"].alter(grads, jnp.asarray(99))[name]
    assert_allclose(spiked, 1e3 * grads[name], rtol=1e-6)
    before = CONDITIONS["spikes of 1e3"].alter(grads, jnp.asarray(98))[name]
    assert_allclose(before, grads[name])
    low = CONDITIONS["gradients of rank 8"].alter(grads, jnp.asarray(0))[name]
    assert np.linalg.matrix_rank(low) == 8
    plain = CONDITIONS["plain"].alter(grads, jnp.asarray(0))[name]
    assert np.linalg.norm(plain) == pytest.approx(1)


def test_an_ablation_replaces_a_name_while_it_is_traced_and_no_longer(
    quick_compilation,
):
    g = jnp.outer(jnp.arange(1.0, 17), jnp.ones(16)).at[3, 5].set(9.0)
    rules = [
        method.matrices(16, 0.95)
        for method in (METHODS["default/8"], ABLATIONS["no floor under v"])
    ]
    updates: Any = [
        rule.update({"": g}, rule.init({"": g}))[0] for rule in (*rules, rules[0])
    ]
    default, without, again = (update[""] for update in updates)
    assert jnp.abs(without - default).max() > 1e-3
    assert_allclose(again, default)


def test_no_ablation_hides_a_method():
    assert not METHODS.keys() & ABLATIONS.keys()


def test_every_method_has_three_rates_a_factor_of_two_apart():
    for method in (METHODS | ABLATIONS).values():
        ratios = np.divide(method.rates[1:], method.rates[:-1])
        assert_allclose(ratios, [2, 2])
