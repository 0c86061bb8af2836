"""What the kernels do one way on one processor and another way on the next."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass


class TuningFields(ctypes.Structure):
    """`Tuning` of tuning.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("fetches_once", "few_rows", "matrix_rows", "matrix_rows_quantized", "multiplies_bf16"),
            *("is_exact", "is_invariant"),
        )
    ]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices that calibration.py measures; what is written here holds where nothing was measured.

    fetches_once: a weight for one or two rows of x is fetched past the second-level cache. few_rows: up to so
    many rows of x, 4 at most, quantised weights are widened in registers, beyond it in memory.
    matrix_rows and matrix_rows_quantized: from so many rows on, weights in bfloat16 and quantised ones are
    multiplied on the matrix unit, where there is one. multiplies_bf16: where there is only AVX512-BF16, many
    rows are multiplied by it.
    """

    fetches_once: bool = False
    few_rows: int = 2
    matrix_rows: int = 8
    matrix_rows_quantized: int = 4
    multiplies_bf16: bool = True

    def fields(self, is_exact: bool, is_invariant: bool) -> TuningFields:
        """The struct for the kernels.

        is_exact: quantised weights are never rounded to bfloat16. is_invariant: a row of a product has the
        same bits whatever was measured, and beside any rows.
        """
        return TuningFields(*astuple(self), is_exact, is_invariant)
