"""The rows, tables and pages of the race in benchmarks/quality."""

import argparse
import dataclasses
import math

import pytest
from numpy.testing import assert_allclose

from benchmarks import fingerprint, stale
from benchmarks.quality import jobs, report, rows, search, summary, table
from benchmarks.quality.conditions import CONDITIONS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rows import Key
from benchmarks.quality.rules import Method, adam
from benchmarks.quality.scales import SCALES

KEY = Key("a", "choose", "plain", "adamw", 2e-3, 4e-3, 0, 10)
RESULT = {
    "loss": 2.0,
    "other_losses": {"text": 2.5},
    "curve": [[5, 2.2], [10, 2.0]],
    "state_bytes": {"matrices": 800, "embeddings": 100, "norms": 100},
    "params": {"matrices": 90, "embeddings": 5, "norms": 5},
    "seconds": 3.0,
}


def test_rows_come_back_by_their_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, KEY, RESULT)
    other = dataclasses.replace(KEY, seed=1)
    rows.append(path, other, RESULT | {"loss": None})
    known = rows.read(path)
    assert list(known) == [KEY, other]
    assert known[KEY]["curve"] == RESULT["curve"]
    assert rows.loss_of(known[other]) == math.inf
    assert rows.of(known, seed=1)[0][0] == other


def fake_losses(monkeypatch, loss):
    """Replaces runs by given losses; returns the rates that were run, in order."""
    ran = []

    def done(key, args):
        ran.append(key.rate)
        return RESULT | {"loss": loss(key.rate)}

    monkeypatch.setattr(jobs, "done", done)
    return ran


@pytest.mark.parametrize("best", [2.5e-4, 2e-3, 3.2e-2])
def test_the_grid_grows_until_the_best_rate_lies_inside(monkeypatch, best):
    ran = fake_losses(monkeypatch, lambda rate: abs(math.log2(rate / best)))
    args = argparse.Namespace(scale="a", rates=None, dense_rate=None, steps=None)
    search.search("adamw", 0, args)
    assert best in ran
    assert min(ran) < best < max(ran)


def test_a_grid_without_a_valley_is_an_error(monkeypatch):
    fake_losses(monkeypatch, lambda rate: rate)
    args = argparse.Namespace(scale="a", rates=None, dense_rate=None, steps=None)
    with pytest.raises(RuntimeError, match="adamw: the best of"):
        search.search("adamw", 0, args)


def test_the_best_rate_is_that_of_the_mean_at_the_common_dense_rate():
    steps = SCALES["a"].steps

    def row(rate, dense_rate, seed, loss):
        key = dataclasses.replace(KEY, rate=rate, dense_rate=dense_rate, seed=seed)
        return dataclasses.replace(key, steps=steps), RESULT | {"loss": loss}

    known = dict(
        [
            row(1e-3, 4e-3, 0, 2.0),
            row(1e-3, 4e-3, 1, 2.4),
            row(2e-3, 4e-3, 0, 2.1),
            row(2e-3, 4e-3, 1, 2.1),
            row(4e-3, 8e-3, 0, 1.0),
            row(4e-3, 4e-3, 0, None),
            row(2e-3, 8e-3, 0, 1.5),
            row(8e-3, 8e-3, 0, 1.5),
        ]
    )
    assert search.best_rate(known, "a", "adamw").rate == 2e-3
    assert search.best_rate(known, "a", "adamw", dense_rate=8e-3).rate == 4e-3
    with pytest.raises(
        SystemExit, match=r"adamw: not searched at a dense rate of 0.01"
    ):
        search.best_rate(known, "a", "adamw", dense_rate=1e-2)
    at_an_end = dict([row(1e-3, 4e-3, 0, 2.0), row(2e-3, 4e-3, 0, 2.1)])
    with pytest.raises(SystemExit, match=r"adamw: the best rate, 0\.001, is an end"):
        search.best_rate(at_an_end, "a", "adamw")


def test_the_table_takes_fresh_seeds_and_the_other_texts(monkeypatch, tmp_path):
    keys = []
    monkeypatch.setattr(jobs, "done", lambda key, args: keys.append(key))
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    best = dataclasses.replace(KEY, steps=SCALES["a"].steps)
    for rate, loss in [(1e-3, 2.1), (2e-3, 2.0), (4e-3, 2.1)]:
        key = dataclasses.replace(best, rate=rate)
        rows.append(tmp_path / "search_a.jsonl", key, RESULT | {"loss": loss})
    args = argparse.Namespace(scale="a", condition="plain", dense_rate=None, steps=None)
    table.race("adamw", 100, args)
    monkeypatch.setitem(METHODS, "other", Method(adam, (), rate_of="adamw"))
    table.race("other", 101, args)
    fresh = dataclasses.replace(best, split="report", seed=100)
    assert keys == [fresh, dataclasses.replace(fresh, method="other", seed=101)]
    assert not set(table.SEEDS) & {0, 1, 2}


@pytest.mark.parametrize("scale", ["a", "b"])
def test_the_committed_tables_have_the_committed_best_rates(scale):
    known = rows.read(rows.FOLDER / f"search_{scale}.jsonl")
    raced = rows.read(rows.FOLDER / f"table_{scale}.jsonl")
    assert {key.method for key in raced} >= set(table.MAIN)
    for key in raced:
        best = search.best_rate(known, scale, METHODS[key.method].rate_of or key.method)
        assert (key.rate, key.dense_rate) == (best.rate, best.dense_rate), key


def result_row(loss: float | None = 2.0, **fields):
    return dataclasses.replace(KEY, **fields), RESULT | {"loss": loss}


def test_differences_are_paired_by_seed():
    known = dict(
        [
            *(result_row(x, seed=s) for s, x in enumerate((2.0, 2.2, 2.4))),
            *(
                result_row(x, method="muon", seed=s)
                for s, x in enumerate((1.9, 2.1, 2.3, 2.1))
            ),
        ]
    )
    best, adamw = summary.summary(known)
    assert best.key.method == "muon"
    assert best.loss == pytest.approx(2.1)
    assert_allclose(best.differences, [-0.1, -0.1, -0.1])
    assert adamw.differences == []
    assert adamw.spread == pytest.approx(0.2)
    assert summary.interval([0.0, 0.1, 0.2]) == "+0.1000 ± 0.2484"
    assert summary.interval([0.0, 0.1, 0.2], digits=1) == "+0.1 ± 0.2"
    assert summary.interval([0.0, 0.2]) == "+0.1000"


def test_a_seed_that_diverged_is_said():
    known = dict(
        [
            *(result_row(2.0, seed=s) for s in range(3)),
            *(
                result_row(x, method="muon", seed=s)
                for s, x in enumerate((1.9, None, 2.0))
            ),
        ]
    )
    _, muon = summary.summary(known)
    assert muon.loss == math.inf
    assert muon.spread is None
    assert summary.interval(muon.differences) == "diverged"
    assert "| optax muon † |  | 2e-3 | inf | diverged |" in report.results_page(
        known, {}
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_method_has_one_rate_in_a_table(seed):
    known = dict([result_row(), result_row(rate=1e-3, seed=seed)])
    with pytest.raises(SystemExit, match="adamw: rows of two rates"):
        summary.summary(known)


def test_a_table_needs_its_reference():
    with pytest.raises(SystemExit, match="no rows of adamw"):
        summary.summary(dict([result_row(method="muon")]))


def test_so_do_conditions():
    known = dict([result_row(), result_row(condition="one row", method="muon")])
    with pytest.raises(SystemExit, match="one row: no rows of adamw"):
        summary.under_conditions(known)
    known = dict([result_row(), result_row(rate=1e-3)])
    with pytest.raises(SystemExit, match=r"adamw \[plain\]: rows of two rates"):
        summary.under_conditions(known)


def test_conditions_are_compared_on_the_seeds_they_share():
    known = dict(
        [
            result_row(2.0),
            result_row(2.2, seed=1),
            result_row(1.9, method="muon"),
            result_row(2.0, method="muon", seed=1),
            result_row(2.5, seed=2),  # Of this one alone.
            result_row(2.1, method="fira/4"),
            result_row(3.0, condition="rate x10"),
            result_row(None, condition="rate x10", method="muon"),
            result_row(3.1, condition="one row"),
        ]
    )
    found = summary.under_conditions(known)
    assert found == {
        "plain": {"adamw": [2.0, 2.2], "muon": [1.9, 2.0]},
        "rate x10": {"adamw": [3.0], "muon": [math.inf]},
        "one row": {"adamw": [3.1]},
    }
    plain, high, row = report.conditions(found, known).splitlines()[2:]
    assert plain == "| plain | 2 | 2.1000 | 1.9500 (-0.1500) | adamw, fira/4, muon |"
    assert high == "| rate x10 | 1 | 3.0000 | inf (diverged) | adamw, muon |"
    assert row == "| one row | 1 | 3.1000 |  | adamw |"


def test_stale_rows_are_marked_and_named():
    numbers = stale.today()["adamw"].numbers
    fresh = dict([result_row()])
    fresh = {key: row | {"fingerprint": numbers} for key, row in fresh.items()}
    text = report.page(fresh, "a", "mine.jsonl")
    assert "| AdamW |" in text
    assert text.endswith("\n\nNone is stale.\n")
    other = dict([result_row(seed=1), result_row(seed=2)])
    *_, last = other
    other[last] = {**other[last], "fingerprint": [2 * x for x in numbers]}
    text = report.page(fresh | other, "a", "mine.jsonl")
    assert "| AdamW † |" in text
    why = "1 of 3: another rule, 1 of 3: not known"
    assert text.endswith(f"\n\nStale (†): adamw ({why}).\n")


def test_the_valley_is_measured_between_the_tried_rates():
    assert summary.valley({1e-3: 2.04, 2e-3: 2.0, 4e-3: 2.04}) == "≥ x4.0"
    assert summary.valley({1e-3: 2.1, 2e-3: 2.0, 4e-3: 2.1}) == "x2.0"
    assert summary.valley({1e-3: math.inf, 2e-3: 2.0, 4e-3: math.inf}) == "x1.0"


def test_searched_losses_are_means_over_seeds_and_apart_by_dense_rate():
    known = dict(
        [
            result_row(2.0),
            result_row(2.2, seed=1),
            result_row(1.9, dense_rate=8e-3),
            result_row(3.0, method="paper_0.25/8", rate=1e-3, dense_rate=4e-3),
            result_row(3.1, method="paper_0.25/8", rate=2e-3, dense_rate=8e-3),
        ]
    )
    common, other, tied = summary.searched(known).items()
    assert common == (("adamw", 4e-3), {2e-3: 2.1})
    assert other == (("adamw", 8e-3), {2e-3: 1.9})
    assert tied == (("paper_0.25/8", None), {1e-3: 3.0, 2e-3: 3.1})


def test_rows_of_other_texts_are_not_mixed(tmp_path):
    path = tmp_path / "rows.jsonl"
    known = {KEY: RESULT | {"texts": "c4"}}
    rows.check_texts(path, known, KEY, "c4")
    rows.check_texts(path, known, dataclasses.replace(KEY, split="report"), "library")
    with pytest.raises(SystemExit, match=r"rows\.jsonl has rows of other texts"):
        rows.check_texts(path, known, dataclasses.replace(KEY, seed=1), "library")


def test_a_finished_run_is_a_row_and_is_not_run_again(tmp_path, monkeypatch):
    """It has the rates of the condition, and only the texts of the other rows."""
    ran = []

    def race(condition, texts="c4"):
        def run(*arguments):
            ran.append(arguments)
            return RESULT | {"texts": texts}

        found = argparse.Namespace(
            condition=CONDITIONS[condition],
            texts=argparse.Namespace(digest=texts),
            run=run,
        )
        monkeypatch.setattr(jobs, "_race", lambda *key: found)

    args = argparse.Namespace(out=tmp_path / "rows.jsonl", data=None, cache=None)
    monkeypatch.setattr(fingerprint, "of", lambda method: [method.rates[0]])
    race("rate x3")
    key = dataclasses.replace(KEY, condition="rate x3")
    row = jobs.done(key, args)
    assert jobs.done(key, args) == row
    assert ran == [(6e-3, 1.2e-2, 0, 10)]
    assert row["commit"]
    assert row["fingerprint"] == [METHODS["adamw"].rates[0]]
    race("plain", texts="library")
    with pytest.raises(SystemExit, match="rows of other texts"):
        jobs.done(KEY, args)
    assert len(ran) == 1


def test_the_report_lies_beside_the_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table_a.jsonl"
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit, match="no rows"):
        report.main()
    rows.append(path, KEY, RESULT)
    rows.append(tmp_path / "search_a.jsonl", KEY, RESULT)
    report.main()
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| AdamW † |  | 2e-3 | 2.000 |  | 1 | 1 |" in text
    assert "Of 100 parameters, 90.0% are the matrices'." in text
    assert "0.002: 2.0000" in text
    assert path.with_suffix(".png").stat().st_size > 0


def test_a_report_of_other_rows_has_none_of_this_folders(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    rows.append(path, KEY, RESULT | {"held_out": "library"})
    monkeypatch.setattr("sys.argv", ["report", "--rows", str(path)])
    report.main()
    text = path.with_suffix(".md").read_text()
    assert "held-out text: library." in text
    assert "search" not in text
    assert "time" not in text


def test_any_method_may_be_what_the_others_are_compared_with(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    for key, row in [
        result_row(2.0),
        result_row(1.9, method="muon"),
        result_row(2.3, method="muon", condition="one row"),
        result_row(1.8, method="fira/4", seed=1),  # No seed in common.
    ]:
        rows.append(path, key, row)
    monkeypatch.setattr("sys.argv", ["report", "--rows", str(path), "--against=muon"])
    report.main()
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == ["| adamw | 1 | +0.1000 |"]
    assert not path.with_suffix(".md").exists()


@pytest.mark.parametrize(
    "name", ["quality/table_a", "quality/table_b", "archive/table_b_dense_4e-3"]
)
def test_the_committed_pages_are_of_the_committed_rows(name):
    path = rows.FOLDER.parent / f"{name}.jsonl"
    file = path.name if "archive" in name else None
    page = report.page(rows.read(path), path.stem[6], file)
    assert path.with_suffix(".md").read_text() == page
