"""Which way the kernels go is measured once for each processor, kept, and changes no result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantized_case import quantized, random_blocks

from microvllm import cli
from microvllm.ops.backends import make_operators
from microvllm.ops.cpu import calibration
from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.calibration import calibrated
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.cpu.tuning import Tuning

LIBRARY = load_kernels()


@pytest.fixture(autouse=True)
def kept_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(calibration, "cache_folder", lambda: folder)
    return folder


def measure(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Tuning, int], float]) -> list[Tuning]:
    """Products take `seconds`, given how they are done and the rows of x. What was timed."""
    timed: list[Tuning] = []

    def products(
        library: object, weights: torch.Tensor, rows: int, number: int, tuning: Tuning
    ) -> Callable[[], float]:
        timed.append(tuning)
        return lambda: seconds(tuning, rows)

    monkeypatch.setattr(calibration, "_products", products)
    return timed


@pytest.mark.parametrize(("past", "once"), [(0.5, True), (0.98, False), (2.0, False)])
def test_a_default_is_given_up_for_a_clear_gain(
    monkeypatch: pytest.MonkeyPatch, past: float, once: bool
) -> None:
    measure(monkeypatch, lambda tuning, rows: past if tuning.fetches_once else 1.0)
    assert calibration.calibrate(LIBRARY).tuning.fetches_once is once


@pytest.mark.parametrize("few", [0, 1, 3, 4])
def test_rows_are_few_up_to_where_widening_is_faster(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    measure(monkeypatch, lambda tuning, rows: rows / (few + 0.5) if tuning.few_rows else 1.0)
    assert calibration.calibrate(LIBRARY).tuning.few_rows == few


@pytest.mark.parametrize(("border", "quantized"), [(2, 32), (8, 4), (32, 2)])
def test_rows_go_to_the_matrix_unit_from_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, border: int, quantized: int
) -> None:
    def seconds(tuning: Tuning, rows: int) -> float:
        on_unit = rows in (tuning.matrix_rows, tuning.matrix_rows_quantized)
        faster_from = border if rows in (tuning.matrix_rows, tuning.matrix_rows - 1) else quantized
        return 0.5 if on_unit and rows >= faster_from else 1.0

    measure(monkeypatch, seconds)
    unit = SimpleNamespace(has_amx=lambda: True)
    found = calibration.calibrate(unit).tuning  # type: ignore[arg-type]
    assert (found.matrix_rows, found.matrix_rows_quantized) == (border, quantized)


def test_one_way_is_measured_in_turns_with_the_other_and_the_least_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times: Iterator[float] = iter([1.0, 5.0, 9.0, 0.5] + [9.0] * 1000)
    measure(monkeypatch, lambda tuning, rows: next(times))
    found = calibration.calibrate(LIBRARY)
    assert next(iter(found.milliseconds.values())) == (1000, 500)
    assert found.tuning.fetches_once


def test_it_is_measured_once_for_a_processor(
    monkeypatch: pytest.MonkeyPatch, kept_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timed = measure(monkeypatch, lambda tuning, rows: 0.5 if tuning.fetches_once else 1.0)
    first, count = calibrated(LIBRARY), len(timed)
    assert first.tuning.fetches_once
    assert calibrated(LIBRARY) == first and len(timed) == count
    (file,) = kept_in.iterdir()
    assert json.loads(file.read_text())["processor"] == first.processor
    monkeypatch.setattr(calibration, "processor_name", lambda: "Another One")
    assert calibrated(LIBRARY).processor == "Another One" and len(timed) == 2 * count
    assert len(list(kept_in.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"tuning": {"other": 1}, "milliseconds": {}}', "[1]"])
def test_a_damaged_file_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, kept_in: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    measure(monkeypatch, lambda tuning, rows: 1.0)
    first = calibrated(LIBRARY)
    (file,) = kept_in.iterdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert calibrated(LIBRARY) == first
    assert str(file) in caplog.text
    assert json.loads(file.read_text())["tuning"]


def test_a_folder_that_is_full_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    measure(monkeypatch, lambda tuning, rows: 1.0)
    monkeypatch.setattr(calibration.tempfile, "NamedTemporaryFile", full)
    assert calibrated(LIBRARY).tuning == Tuning(few_rows=4)
    assert "no space left" in caplog.text


def test_operators_go_the_way_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda tuning, rows: 0.5 if tuning.fetches_once else 1.0)
    operators = make_operators("cpu", torch.float32, 1)
    assert isinstance(operators, CpuOperators)
    assert (operators.tuning.fetches_once, operators.tuning.few_rows) == (1, 4)


def test_the_real_measurement_ends_soon_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    found = calibrated(LIBRARY)
    assert all(0 < ms < 10_000 for pair in found.milliseconds.values() for ms in pair)
    assert 0 <= found.tuning.few_rows <= calibration.MOST_FEW_ROWS
    assert cli.run(["collect-env"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"chosen by measurement {found}" in printed


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_way_computes_the_same(name: str, rows: int) -> None:
    x, raw = torch.randn(rows, 512), random_blocks(name, 40, 16 if name in ("Q4_1", "Q8_0") else 2, 0)
    ways = [Tuning(once, few) for once in (False, True) for few in (0, 4)]
    results = [CpuOperators(LIBRARY, 2, tuning=way).linear(quantized((name, raw)))(x) for way in ways]
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-5 * results[0].abs().max()
    plain = [CpuOperators(LIBRARY, 2, tuning=way).linear(torch.eye(512).bfloat16())(x) for way in ways]
    assert all(torch.equal(result, x) for result in plain)
