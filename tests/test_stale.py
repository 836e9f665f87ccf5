"""benchmarks/stale.py: which results today's code would not reproduce."""

import dataclasses
import json

import optax
import pytest

from benchmarks import _record, fingerprint, stale
from benchmarks.quality import rows
from benchmarks.quality.ablations import ABLATIONS, ENTRANTS
from benchmarks.quality.methods import METHODS


@pytest.mark.parametrize("name", ["default/8", "default_muon/8"])
def test_todays_fingerprints_are_of_this_code(name, quick_compilation):
    """They agree within the tolerance, also with the rounding of this machine."""
    numbers = fingerprint.of(METHODS[name])
    assert not stale.fault(name, numbers, stale.today()), (
        f"{name} computes something else than before. If that is meant, "
        "run `python -m benchmarks.stale`, commit results/fingerprints.json, and put "
        "what it prints into benchmarks/README.md."
    )


def test_every_method_has_one():
    assert stale.today().keys() == ENTRANTS.keys()


def test_every_ablation_has_its_own():
    """Except that a tenth of the noise changes less than rounding may."""
    now, unseen = stale.today(), {"0.0001 of noise in the sketch"}
    for name in ABLATIONS:
        default = "default_muon/8" if name.startswith("muon") else "default/8"
        same = fingerprint.is_same(now[name].numbers, *now[default])
        assert same == (name in unseen), name


def test_a_fingerprint_is_of_the_rule_and_not_of_its_rounding(quick_compilation):
    def numbers(rate, b1=0.9):
        rule = optax.chain(optax.scale(rate), optax.scale_by_adam(b1, 0.95, eps=0.0))
        return fingerprint.of_rule(rule, fingerprint.MATRICES)

    expected = numbers(1.0)
    assert len(expected) == 2 * 2 * len(fingerprint.SEEN)
    assert numbers(0.1) == pytest.approx(expected, abs=2e-4)  # 0.1 is not exact.
    assert fingerprint.is_same(numbers(0.1), expected, 1e-3)
    assert not fingerprint.is_same(numbers(1.0, b1=0.905), expected, 1e-3)
    assert not fingerprint.is_same(expected[:6], expected, 1e-3)


def test_what_is_stale_is_listed_by_file_and_method(tmp_path):
    (tmp_path / "quality").mkdir()
    key = rows.Key("a", "choose", "plain", "adamw", 2e-3, 4e-3, 0, 10)
    for seed, numbers in enumerate(([1.0, 0.5], [1.0001, 0.5], [1.1, 0.5], None)):
        found = {} if numbers is None else {"fingerprint": numbers}
        other = dataclasses.replace(key, seed=seed)
        rows.append(
            tmp_path / "quality" / "table_a.jsonl", other, {"loss": 2.0} | found
        )
    found = {"muon": [3.0], "rung": [1.0]}
    (tmp_path / "time.json").write_text(json.dumps({"fingerprints": found}))
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "old.json").write_text("{}")
    now = {"adamw": stale.Now([1.0, 0.5], 1e-3), "muon": stale.Now([3.0], 1e-3)}
    assert stale.table(now, tmp_path).splitlines()[2:] == [
        "| quality/table_a.jsonl | `adamw` | 1 of 4 | another rule |",
        "| quality/table_a.jsonl | `adamw` | 1 of 4 | not known |",
        "| time.json | `rung` | 1 of 1 | no code |",
    ]
    assert stale.table(now, tmp_path / "quality") == "None."


def test_results_without_code_are_in_the_archive():
    gone = {x.method for x in stale.results()} - ENTRANTS.keys()
    assert not gone


def test_the_page_lists_what_is_stale():
    page = (_record.RESULTS.parent / "README.md").read_text()
    assert f"\n\n{stale.table(stale.today())}\n" in page
