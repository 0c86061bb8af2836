"""Lists the formats in which weights are kept in memory, and loads each.

The kind of tensor that a format loads decides the product: a plain tensor is multiplied by every device's
`Operators.linear`, a `QuantizedTensor` by the CPU's kernels from its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from microvllm.adapters.checkpoints import Checkpoint, GGUFCheckpoint, stored_name
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.tensors import Slot
from microvllm.ops.quantized import QuantizedTensor


class WeightFormat(Protocol):
    """How a tensor of the model is loaded and kept."""

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        """Whether the stored tensors of a slot can be kept in this format."""
        ...

    def stored_shapes(self, checkpoint: Checkpoint, slot: Slot) -> dict[str, tuple[int, ...]]:
        """The tensors that the checkpoint has to store for a slot."""
        ...

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        """Load a slot; `loaded` is called after each stored tensor. Raises `ModelFileError`."""
        ...


class Dense:
    """Values of one dtype, whatever the checkpoint stores."""

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return True

    def stored_shapes(self, checkpoint: Checkpoint, slot: Slot) -> dict[str, tuple[int, ...]]:
        return {stored_name(checkpoint, part, slot.layer): slot.stored_shape(part) for part in slot.parts}

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        tensor = allocate(checkpoint.path, slot.name, slot.shape, dtype, device)
        pieces = torch.split(tensor, [part.rows.size for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            checkpoint.copy(stored_name(checkpoint, part, slot.layer), part, slot.columns, piece)
            loaded()
        return tensor


class Packed(Dense):
    """ggml's blocks as a GGUF file has them: a `QuantizedTensor`, on the CPU. Vectors are float32.

    Nothing in such a file is rounded, unless it has matrices that are not quantised.
    """

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return isinstance(checkpoint, GGUFCheckpoint) and (
            slot.columns is None or checkpoint.is_quantized(slot)
        )

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, GGUFCheckpoint):
            return super().load(checkpoint, slot, torch.float32, device, loaded)
        names = [stored_name(checkpoint, part, slot.layer) for part in slot.parts]
        stored = list(zip(names, slot.parts, strict=True))
        rows = tuple(checkpoint.quantized_rows(name, part, slot.columns) for name, part in stored)
        sizes = [one.rows * one.row_bytes for one in rows]
        data = allocate(checkpoint.path, slot.name, (sum(sizes),), torch.uint8, "cpu")
        for (name, part), piece in zip(stored, torch.split(data, sizes), strict=True):
            checkpoint.copy_quantized(name, part, slot.columns, piece)
            loaded()
        return QuantizedTensor.of(data, slot.columns.size, rows)


def allocate(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An uninitialised tensor. Raises `ModelFileError` naming the model and the tensor if memory is short."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise ModelFileError(path, f"no memory for {name} {list(shape)} ({size:.1f} GiB)") from None


FORMATS: tuple[WeightFormat, ...] = (Dense(),)  # the first that accepts a slot loads it
PACKED = Packed()
