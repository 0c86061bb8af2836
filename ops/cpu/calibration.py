"""Measures at the first start which of two ways this processor is faster.

Fetched past the second-level cache, an AMD Zen reads weights as fast as any other way, a Sapphire Rapids
Xeon half as fast; how many rows are few differs too. Processor time of one thread is compared, which other
processes disturb least, and in turns: the way that is not the default is chosen only if it is faster by 5 %
or more in three quarters of the turns and at its best. The result is kept beside the compiled kernels, for
this processor and library. What was measured while other processes were busy is measured again at later
starts, until it was once measured without them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from microvllm.ops.cache import is_trusted
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.cpu.tuning import Tuning
from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

logger = logging.getLogger(__name__)

VERSION = 7  # of what is measured, and of the rules by which it is judged
BF16, Q4_1 = 30, 3  # ggml's numbers of formats
SIDE = 1024  # rows and columns of each weight
STREAMED_BYTES = 128 << 20  # more than the caches hold
COMPUTED_BYTES = 8 << 20
MATRIX_BYTES = 64 << 20  # in the caches the matrix unit gains more than with weights that are waited for
FEWEST_TURNS, MOST_TURNS = 6, 24  # more than the fewest only while they disagree
MOST_SECONDS = 1.0  # on a busy machine, for one comparison that has the fewest turns
CLEAR_GAIN = 0.95  # of the time
WINNING_SHARE = 0.75  # of the turns
QUIET_LOAD = 0.1
MOST_TRIES = 4  # however busy the machine is
MOST_FEW_ROWS = 4
_NUMBERS = {"cpu family": "family", "model": "model"}
MATRIX_ROWS = (2, 4, 6, 8, 12, 16, 24, 32)
MANY_ROWS = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """The default way and the other: the least milliseconds of each, and in how many turns the other won."""

    default_ms: float
    other_ms: float
    wins: int
    turns: int

    @property
    def is_won(self) -> bool:
        """Whether the other way is clearly faster: in most turns, and where both were disturbed least."""
        return self.wins >= WINNING_SHARE * self.turns and self.other_ms < CLEAR_GAIN * self.default_ms

    @property
    def is_clear(self) -> bool:
        """Whether nearly all turns agree, so that more of them would change nothing."""
        return min(self.wins, self.turns - self.wins) <= self.turns // 12

    def __str__(self) -> str:
        text = f"{self.default_ms:.2f}, {self.other_ms:.2f}, {self.wins} of {self.turns} turns"
        return text if self.is_clear else f"{text} (close)"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The choices, and the comparison that each comes from.

    load: share of all processors' time, 0 to 1, that others used in the meantime; tries: how often it was
    measured on this machine.
    """

    processor: str
    tuning: Tuning
    comparisons: dict[str, Comparison]
    load: float = 0.0
    tries: int = 1

    @property
    def is_sure(self) -> bool:
        """Whether other processes disturbed it little."""
        return self.load <= QUIET_LOAD

    def __str__(self) -> str:
        choices = ", ".join(f"{name} {value:d}" for name, value in asdict(self.tuning).items())
        times = "; ".join(f"{what} {each}" for what, each in self.comparisons.items())
        again = "" if self.is_sure else ", not sure: will be measured again when the machine is quiet"
        return f"{choices} (load {self.load:.0%}, try {self.tries}{again}; ms and wins: {times})"


def calibrated(library: ctypes.CDLL) -> Calibration:
    """The kept calibration of these kernels on this processor, or a new one, which takes a third of a second.

    What was measured under load is measured again, at the next starts and then whenever the machine seems
    quiet. Of several under load, the one under the least is used.
    """
    processor = processor_name()
    key = hashlib.sha256(repr((VERSION, processor, Path(library._name).name)).encode()).hexdigest()
    file = _folder(library) / f"calibration-{key[:16]}.json"
    kept = _read(file)
    if kept is not None and (kept.is_sure or (kept.tries >= MOST_TRIES and not _seems_quiet())):
        return kept
    found = calibrate(library)
    if kept is not None:
        found = replace(min(found, kept, key=lambda each: each.load), tries=kept.tries + 1)
    logger.info("measured for %s: %s", processor, found)
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(asdict(found), written, indent=1)
        Path(written.name).replace(file)  # in one step, as several processes may calibrate at once
    except OSError as error:
        logger.warning("%s cannot be written: %s", file, error)
    return found


def _folder(library: ctypes.CDLL) -> Path:
    return Path(library._name).parent


def _seems_quiet() -> bool:
    """Whether others have used little of the processors in the last minute; False where nothing says so."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] < max(1.0, QUIET_LOAD * (os.cpu_count() or 1))


def _read(file: Path) -> Calibration | None:
    if not is_trusted(file):
        return None
    try:
        kept = json.loads(file.read_text())
        comparisons = {what: Comparison(**each) for what, each in kept.pop("comparisons").items()}
        return Calibration(**{**kept, "tuning": Tuning(**kept["tuning"])}, comparisons=comparisons)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read, and is written anew: %s", file, error)
        return None


def processor_name() -> str:
    """Return the model name with family and model, or the architecture if the system gives none.

    Virtual machines report names such as "AMD EPYC" for every generation.
    """
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = ", ".join(f"{word} {found[key]}" for key, word in _NUMBERS.items() if key in found)
    return f"{found['model name']} ({numbers})" if numbers else found["model name"]


def calibrate(library: ctypes.CDLL) -> Calibration:
    """Measures every choice, one after the other, each with the ones before it as they came out."""
    weights = torch.empty(STREAMED_BYTES, dtype=torch.uint8).fill_(0x3C)  # about 1 in every format
    comparisons: dict[str, Comparison] = {}
    load = _LoadOfOthers()

    def gain(what: str, rows: int, number: int, usual: Tuning, other: Tuning, count: int) -> bool:
        """Whether the other way is clearly faster."""
        ways = (_products(library, weights[:count], rows, number, way) for way in (usual, other))
        comparisons[what] = _compare(*ways)
        return comparisons[what].is_won

    tuning = Tuning()
    past = replace(tuning, fetches_once=not tuning.fetches_once)
    if gain("through the second level, past it", 1, BF16, tuning, past, STREAMED_BYTES):
        tuning = past
    few = 0
    while few < MOST_FEW_ROWS:
        registers, widened = replace(tuning, few_rows=few + 1), replace(tuning, few_rows=0)
        what = f"{few + 1} x quantised in registers, widened"
        if gain(what, few + 1, Q4_1, registers, widened, COMPUTED_BYTES):
            break
        few += 1
    tuning = replace(tuning, few_rows=few)
    if library.has_amx():
        for field, number in (("matrix_rows", BF16), ("matrix_rows_quantized", Q4_1)):
            for rows in MATRIX_ROWS:
                vectors, matrix = (Tuning(**{**asdict(tuning), field: border}) for border in (rows + 1, rows))
                what = f"{rows} x {'bfloat16' if number == BF16 else 'quantised'} by vectors, by matrix unit"
                count = MATRIX_BYTES if number == BF16 else COMPUTED_BYTES
                if gain(what, rows, number, vectors, matrix, count):
                    break
            tuning = matrix
    elif library.has_bf16():
        exact = replace(tuning, multiplies_bf16=False)
        what = f"{MANY_ROWS} x bfloat16 by AVX512-BF16, by float32"
        if gain(what, MANY_ROWS, BF16, tuning, exact, COMPUTED_BYTES // 4):
            tuning = exact
    return Calibration(processor_name(), tuning, comparisons, round(load.measure(), 3))


def _compare(default: Callable[[], float], other: Callable[[], float]) -> Comparison:
    """Seconds of both in turns, until these agree."""
    default(), other()  # the caches and the clock get ready
    best, wins, turn, end = [float("inf")] * 2, 0, 0, time.perf_counter() + MOST_SECONDS
    while True:
        times = [0.0, 0.0]
        for way in (0, 1) if turn % 2 else (1, 0):  # a drift is no gain
            times[way] = (default, other)[way]()
        best = [min(pair) for pair in zip(best, times, strict=True)]
        wins, turn = wins + (times[1] < CLEAR_GAIN * times[0]), turn + 1
        found = Comparison(round(1e3 * best[0], 3), round(1e3 * best[1], 3), wins, turn)
        is_late = turn >= MOST_TURNS or time.perf_counter() > end
        if turn >= FEWEST_TURNS and (found.is_clear or is_late):
            return found


class _LoadOfOthers:
    """What other processes, and a host's other guests, use of all processors from now on."""

    def __init__(self) -> None:
        self._begin = self._used()

    @staticmethod
    def _used() -> tuple[float, float, float] | None:
        """Seconds of all processors, seconds that they were busy, and of these this process's."""
        try:
            first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:  # no Linux
            return None
        ticks = [int(each) for each in first]
        idle = ticks[3] + ticks[4]  # and waiting for disks
        per_second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, time.process_time()

    def measure(self) -> float:
        """Share of all processors' time, 0 to 1; 0 where the system does not report it."""
        end = self._used()
        if self._begin is None or end is None:
            return 0.0
        seconds, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return min(1.0, max(0.0, (busy - own) / seconds)) if seconds > 0 else 0.0


def _products(
    library: ctypes.CDLL, weights: torch.Tensor, rows: int, number: int, tuning: Tuning
) -> Callable[[], float]:
    """A function that multiplies with all weights once and returns the seconds that this takes undisturbed.

    They are those of the product of median length, as a product that another process interrupts finds the
    caches cold: there are few of these.
    """
    operators = CpuOperators(library, 1, tuning=tuning)
    size = library.packed_bytes(number, SIDE, SIDE)
    layers = []
    for begin in range(0, len(weights) - size + 1, size):
        weight = QuantizedTensor.of(
            torch.empty(0, dtype=torch.uint8), SIDE, (QuantizedRows(number, SIDE, 0),)
        )
        weight.packed = weights[begin : begin + size]
        layers.append(operators.linear(weight))
    x = torch.ones(rows, SIDE)

    def run() -> float:
        times = []
        for layer in layers:
            begin = time.thread_time()
            layer(x)
            times.append(time.thread_time() - begin)
        return len(times) * median(times)

    return run
