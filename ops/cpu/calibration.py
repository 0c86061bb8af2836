"""Measures at the first start which of two ways this processor is faster.

Fetched past the second-level cache, an AMD Zen reads weights as fast as any other way, a Sapphire Rapids Xeon
half as fast; how many rows are few is another matter on each. Processor time of one thread is compared, which
other processes disturb least, and a default is given up only for a clear gain. The result is kept beside the
compiled kernels, for this processor and library, until the file is deleted.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from microvllm.ops.cache import cache_folder, is_trusted
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.cpu.tuning import Tuning
from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

logger = logging.getLogger(__name__)

BF16, Q4_1 = 30, 3  # ggml's numbers of formats
SIDE = 1024  # rows and columns of each weight
STREAMED_BYTES = 128 << 20  # more than the caches hold
COMPUTED_BYTES = 8 << 20
TURNS = 5
CLEAR_GAIN = 0.95  # of the time
MOST_FEW_ROWS = 4
MATRIX_ROWS = (2, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, slots=True)
class Calibration:
    """milliseconds: what each choice took one way and the other."""

    processor: str
    tuning: Tuning
    milliseconds: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        choices = ", ".join(f"{name} {value:d}" for name, value in asdict(self.tuning).items())
        times = ", ".join(f"{what} {a:.2f}, {b:.2f}" for what, (a, b) in self.milliseconds.items())
        return f"{choices} (ms: {times})"


def calibrated(library: ctypes.CDLL) -> Calibration:
    """The kept calibration of these kernels on this processor, or a new one, which takes half a second."""
    processor = processor_name()
    key = hashlib.sha256(repr((processor, Path(library._name).name)).encode()).hexdigest()
    file = cache_folder() / f"calibration-{key[:16]}.json"
    if is_trusted(file):
        try:
            kept = json.loads(file.read_text())
            times = {what: (float(a), float(b)) for what, (a, b) in kept["milliseconds"].items()}
            return Calibration(processor, Tuning(**kept["tuning"]), times)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("%s cannot be read, and is written anew: %s", file, error)
    found = calibrate(library)
    logger.info("measured for %s: %s", processor, found)
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(asdict(found), written, indent=1)
        Path(written.name).replace(file)  # in one step, as several processes may calibrate at once
    except OSError as error:
        logger.warning("%s cannot be written: %s", file, error)
    return found


def processor_name() -> str:
    """Return the processor's model name, or its architecture if the system gives none."""
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def calibrate(library: ctypes.CDLL) -> Calibration:
    """Measures every choice, one after the other, each with the ones before it as they came out."""
    weights = torch.empty(STREAMED_BYTES, dtype=torch.uint8).fill_(0x3C)  # about 1 in every format
    milliseconds: dict[str, tuple[float, float]] = {}

    def gain(what: str, rows: int, number: int, usual: Tuning, other: Tuning, count: int) -> bool:
        """Whether the other way is clearly faster."""
        runs = [_products(library, weights[:count], rows, number, way) for way in (usual, other)]
        times = [[run() for run in runs] for _ in range(TURNS)]
        a, b = (1e3 * min(column) for column in zip(*times, strict=True))
        milliseconds[what] = round(a, 3), round(b, 3)
        return bool(b < CLEAR_GAIN * a)

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
                if gain(what, rows, number, vectors, matrix, COMPUTED_BYTES):
                    break
            tuning = matrix
    return Calibration(processor_name(), tuning, milliseconds)


def _products(
    library: ctypes.CDLL, weights: torch.Tensor, rows: int, number: int, tuning: Tuning
) -> Callable[[], float]:
    """A function that multiplies with all weights once and returns the seconds that it computed."""
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
        begin = time.thread_time()
        for layer in layers:
            layer(x)
        return time.thread_time() - begin

    return run
