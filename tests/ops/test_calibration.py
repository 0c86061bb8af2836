"""Which way the kernels go is measured once for each processor, kept, and changes no result."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable
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
MEASURE_LOAD = calibration._LoadOfOthers.measure


@pytest.fixture(autouse=True)
def kept_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(calibration, "_folder", lambda library: folder)
    monkeypatch.setattr(calibration._LoadOfOthers, "measure", lambda self: 0.0)
    return folder


def measure(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Tuning, int], float]) -> list[Tuning]:
    """Products take `seconds`, given how they are done and the rows of x. What was timed of them."""
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


@pytest.mark.parametrize(("seconds", "is_rounded"), [(0.5, True), (1.02, True), (2.0, False)])
def test_many_rows_are_rounded_unless_that_is_slower(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_rounded: bool
) -> None:
    measure(monkeypatch, lambda tuning, rows: seconds if tuning.multiplies_bf16 else 1.0)
    vectors = SimpleNamespace(has_amx=lambda: False, has_bf16=lambda: True)
    assert calibration.calibrate(vectors).tuning.multiplies_bf16 is is_rounded  # type: ignore[arg-type]


def turns(default: Iterable[float], other: Iterable[float]) -> calibration.Comparison:
    """The comparison of ways that take these seconds, the first of which do not count."""
    ways = [iter([1.0, *each]).__next__ for each in (default, other)]
    return calibration._compare(*ways)


def test_turns_that_agree_are_few() -> None:
    assert turns([1.0] * 6, [0.9] * 6) == calibration.Comparison(1000, 900, 6, 6)


def test_one_turn_of_a_busy_neighbour_decides_nothing() -> None:
    fast_once = turns([1.0] * 24, [1.0] * 5 + [0.1] + [1.0] * 18)
    assert not fast_once.is_won and fast_once.other_ms == 100
    slow_once = turns([1.0] * 24, [0.9] * 5 + [9.0] + [0.9] * 18)
    assert slow_once.is_won


@pytest.mark.parametrize(("wins", "is_won"), [(17, False), (18, True)])
def test_the_other_way_wins_with_three_quarters_of_all_turns(wins: int, is_won: bool) -> None:
    other = [1.0] * 24
    for turn in range(wins):  # every fourth one is lost as long as there are such
        other[[*(each for each in range(24) if each % 4), *range(0, 24, 4)][turn]] = 0.9
    found = turns([1.0] * 24, other)
    assert (found.wins, found.turns, found.is_won) == (wins, 24, is_won)


def test_the_other_way_wins_only_if_it_is_faster_undisturbed() -> None:
    found = turns([0.5] + [1.0] * 23, [0.6] * 24)
    assert (found.wins, found.turns, found.is_won) == (11, 12, False)


def test_interrupted_products_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = [0.0], iter([1.0] * 8 + [50.0] * 3 + [1.0] * 8)

    class Operators:
        def __init__(self, *_: object, **__: object) -> None: ...

        def linear(self, weight: object) -> Callable[[torch.Tensor], None]:
            return lambda x: clock.__setitem__(0, clock[0] + next(taken))

    monkeypatch.setattr(calibration, "CpuOperators", Operators)
    monkeypatch.setattr(calibration.time, "thread_time", lambda: clock[0])
    library = SimpleNamespace(packed_bytes=lambda *_: 100)
    run = calibration._products(library, torch.empty(1900, dtype=torch.uint8), 1, 3, Tuning())  # type: ignore[arg-type]
    assert run() == 19


def test_a_drift_of_the_machine_is_no_gain() -> None:
    seconds = iter(
        [1.0 * 0.9**i for i in range(100)]
    )  # every measurement is a tenth faster than the one before
    found = calibration._compare(lambda: next(seconds), lambda: next(seconds))
    assert not found.is_won and found.turns == calibration.MOST_TURNS


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nmodel\t\t: 2\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("model name\t: Something\n", "Something"),
    ],
)
def test_generations_of_one_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, info: str, name: str
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: info)
    assert calibration.processor_name() == name


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
    monkeypatch.setattr(calibration, "VERSION", calibration.VERSION + 1)
    assert calibrated(LIBRARY).processor == "Another One" and len(timed) == 3 * count


def under_loads(monkeypatch: pytest.MonkeyPatch, *loads: float) -> None:
    """What the next calibrations are measured under."""
    left = iter(loads)
    monkeypatch.setattr(calibration._LoadOfOthers, "measure", lambda self: next(left))


def test_what_was_measured_under_load_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    under_loads(monkeypatch, 0.9, 0.05)
    measure(monkeypatch, lambda tuning, rows: 1.0)
    busy = calibrated(LIBRARY)
    assert not busy.is_sure and "will be measured again" in str(busy)
    timed = measure(monkeypatch, lambda tuning, rows: 0.5 if tuning.fetches_once else 1.0)
    quiet = calibrated(LIBRARY)
    assert quiet.tuning.fetches_once and (quiet.load, quiet.tries, quiet.is_sure) == (0.05, 2, True)
    assert "again" not in str(quiet)
    count = len(timed)
    assert calibrated(LIBRARY) == quiet and len(timed) == count


def test_on_a_machine_that_is_always_busy_the_least_load_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    under_loads(monkeypatch, 0.9, 0.5, 0.8, 0.7)
    timed = measure(monkeypatch, lambda tuning, rows: 1.0)
    found = [calibrated(LIBRARY) for _ in range(4)]
    assert [(each.load, each.tries) for each in found] == [(0.9, 1), (0.5, 2), (0.5, 3), (0.5, 4)]
    count = len(timed)
    average = [1.5]
    monkeypatch.setattr(calibration.os, "getloadavg", lambda: (average[0], 0.0, 0.0))
    monkeypatch.setattr(calibration.os, "cpu_count", lambda: 2)
    assert calibrated(LIBRARY) == found[-1] and len(timed) == count
    average[0] = 0.9  # quiet at last, however many tries there were
    under_loads(monkeypatch, 0.3, 0.05)
    assert [calibrated(LIBRARY).load for _ in range(3)] == [0.3, 0.05, 0.05]
    assert len(timed) == 3 * count // 2


def test_a_comparison_ends_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: float(next(now)))
    found = turns([1.0] * 24, [0.9, 1.1] * 12)  # undecided, a second each
    assert (found.turns, found.is_clear) == (calibration.FEWEST_TURNS, False)
    assert "(close)" in str(found)


def test_the_load_is_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([(100.0, 40.0, 3.0), (110.0, 46.0, 5.0)])
    monkeypatch.setattr(calibration._LoadOfOthers, "_used", staticmethod(lambda: next(used)))
    assert MEASURE_LOAD(calibration._LoadOfOthers()) == pytest.approx(0.4)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no Linux")
def test_another_process_is_load() -> None:
    load = calibration._LoadOfOthers()
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert 0 < MEASURE_LOAD(load) <= 1


def test_a_system_without_proc_has_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration._LoadOfOthers, "_used", staticmethod(lambda: None))
    assert MEASURE_LOAD(calibration._LoadOfOthers()) == 0


@pytest.mark.parametrize(
    "text", ["", "{}", '{"tuning": {"other": 1}, "comparisons": {}}', '{"comparisons": []}', "[1]"]
)
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
    assert calibrated(LIBRARY).tuning == calibration.calibrate(LIBRARY).tuning
    assert "no space left" in caplog.text


def test_operators_go_the_way_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, lambda tuning, rows: 0.5 if tuning.fetches_once else 1.0)
    operators = make_operators("cpu", torch.float32, 1)
    assert isinstance(operators, CpuOperators)
    assert (operators.tuning.fetches_once, operators.tuning.few_rows) == (1, 4)


def test_the_real_measurement_ends_soon_and_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration._LoadOfOthers, "measure", MEASURE_LOAD)
    found = calibration.calibrate(LIBRARY)
    assert 0 <= found.load <= 1
    monkeypatch.setattr(calibration, "calibrate", lambda library: found)
    assert all(0 < each.default_ms < 10_000 for each in found.comparisons.values())
    assert all(0 < each.other_ms < 10_000 for each in found.comparisons.values())
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
