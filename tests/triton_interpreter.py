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


if DEVICE.type == "cpu":
    _take_scalars_as_integers()
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # a GPU gives inf and nan without a word
