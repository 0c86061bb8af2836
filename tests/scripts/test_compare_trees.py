"""Tests the table of scripts/compare_trees.py."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import compare_trees  # noqa: E402


def test_ratios_are_taken_within_a_round() -> None:
    times = {("bf16", "products, 1 rows"): {"old": [10.0, 40.0, 9.0], "new": [5.0, 10.0, 9.0]}}
    assert compare_trees.table(times, ["old", "new"]).splitlines()[-1] == (
        "| bf16 | products, 1 rows | 9.00 | 5.00 | 2.00 (1.00 to 4.00) |"
    )


def test_a_member_without_a_measurement_leaves_its_cells_empty() -> None:
    times = {("file", "prompt of 1000"): {"old": [3.0], "new": [2.0]}}
    row = compare_trees.table(times, ["old", "new", "llama.cpp"]).splitlines()[-1]
    assert row == "| file | prompt of 1000 | 3.00 | 2.00 |  | 1.50 (1.50 to 1.50) |  |"


def test_a_token_of_context_costs_the_growth_of_a_step() -> None:
    times = {
        ("bf16", "decode step behind 1000"): {"new": [10.0]},
        ("bf16", "decode step behind 7900"): {"new": [16.9]},
    }
    compare_trees.add_context_costs(times)
    assert times["bf16", "us a token of context"]["new"] == [pytest.approx(1.0)]


def test_what_is_no_checkout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["compare_trees.py", str(tmp_path), "."])
        compare_trees.main()
    assert "is no checkout of this repository" in capsys.readouterr().err
