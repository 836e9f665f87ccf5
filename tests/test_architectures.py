"""The code of benchmarks/architectures, on tiny networks."""

import math

import jax
import numpy as np
import pytest

import lorapre_jax as lp
from benchmarks import _comparison
from benchmarks.architectures import data, models, optimizers, training

TINY = {"mixer": models.mixer(width=8, depth=2), "convnet": models.convnet(width=8)}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "DRAWS", 1)


@pytest.mark.usefixtures("quick_compilation", "small_batches")
@pytest.mark.parametrize(
    ("name", "rule"), [("mixer", "lorapre_muon"), ("convnet", "lorapre_adamw")]
)
def test_two_steps(name, rule):
    images = data.Images(*(x[:8] for x in data.digits()["train"]))
    run = training.make_run(TINY[name], rule, steps=2)
    still, moved = (run(images, images, rate, 0.0, 0) for rate in (0.0, 0.1))
    start = TINY[name].init(jax.random.split(jax.random.key(0))[0])
    assert still.training == pytest.approx(training.final(TINY[name], start, images))
    assert moved.training < still.training - 0.1
    assert moved.held_out == moved.training  # The images are the same.


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_networks_are_mostly_factored(name):
    coverage = optimizers.coverage(models.ARCHITECTURES[name], "lorapre_adamw")
    assert coverage["factored share"] > 0.9
    assert coverage["state ratio"] < 0.15


def test_convolution_kernels_are_factored_with_their_window_in_the_rows():
    architecture = models.ARCHITECTURES["convnet"]
    tx = optimizers.optimizer(architecture, "lorapre_adamw", 1.0, 1.0)
    params = jax.eval_shape(architecture.init, jax.random.key(0))
    factored = [leaf for leaf in lp.describe(tx, params).leaves if leaf.is_factored]
    assert [leaf.path for leaf in factored] == [f"convs/{i}/kernel" for i in range(4)]
    for leaf in factored:
        assert leaf.shape == (3, 3, 64, 64)
        assert (leaf.batch_shape, leaf.p, leaf.q, leaf.rank) == ((), 576, 64, 8)


def test_a_rule_that_leaves_a_matrix_dense_is_noticed():
    too_narrow = models.convnet(width=1)
    with pytest.raises(AssertionError, match="convs"):
        optimizers.coverage(too_narrow, "lorapre_adamw")


def test_splits_are_disjoint_and_complete():
    splits = data.digits()
    images = np.concatenate([x.pixels.reshape(-1, 64) for x in splits.values()])
    assert len(images) == len(np.unique(images, axis=0)) == 1797


def test_search_goes_on_until_the_best_rate_has_worse_neighbours():
    best, scores = _comparison.best_rate(
        "rule", lambda rate: abs(math.log2(rate) + 3.0), [2.0**-9, 2.0**-8, 2.0**-7]
    )
    assert best == 2.0**-3
    assert list(scores) == [2.0**i for i in range(-9, -1)]


def test_search_leaves_rates_that_diverge():
    def score(rate):
        return abs(math.log2(rate) + 12.0) if rate < 1e-3 else math.nan

    best, scores = _comparison.best_rate("rule", score, [2.0**-10, 2.0**-9, 2.0**-8])
    assert best == 2.0**-12
    assert scores[2.0**-8] == math.inf


def test_interval():
    # Mean 3, standard error 1; Student's t with 2 degrees of freedom.
    assert _comparison.interval([2.0, 2.0, 5.0]) == pytest.approx((3.0, 4.302653))
