"""Import this before any kernel: without a GPU, Triton's kernels then run in its interpreter.

Whether a kernel is compiled or interpreted is decided where it is defined.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton itself is imported
# 640 MB, and of use on a GPU alone: no dependency of the tests.
pytest.importorskip("triton", reason="needs the package triton (pip install triton)")


def _take_scalars_as_integers() -> None:
    """A scalar is an array of one element there, which numpy from 2.4 on takes for no integer."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index


def _convert_e4m3_as_the_hardware() -> None:
    """Rounding to e4m3 loses the carry into the exponent there, and cuts subnormal numbers off."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target.is_fp8e4nv() and source.is_fp32():
            return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = converted


if DEVICE.type == "cpu":
    _take_scalars_as_integers()
    _convert_e4m3_as_the_hardware()
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # a GPU gives inf and nan without a word
