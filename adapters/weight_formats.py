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

from microvllm.adapters.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    GGUFCheckpoint,
    stored_name,
)
from microvllm.adapters.dequantize import CHUNK_ELEMENTS, LAYOUTS, Rectangle, check
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.quantization import KEY, Scheme
from microvllm.adapters.tensors import WHOLE, Part, Slot
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
        shapes = {stored_name(checkpoint, part, slot.layer): slot.stored_shape(part) for part in slot.parts}
        for name in shapes:
            checkpoint.check_plain(name)
        return shapes

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        tensor = allocate(checkpoint.path, slot.name, slot.shape, dtype, device)
        pieces = torch.split(tensor, [part.rows.size for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            self._copy(checkpoint, slot, part, piece)
            loaded()
        return tensor

    def _copy(self, checkpoint: Checkpoint, slot: Slot, part: Part, out: torch.Tensor) -> None:
        checkpoint.copy(stored_name(checkpoint, part, slot.layer), part, slot.columns, out)


class Dequantized(Dense):
    """Matrices of a quantised Hugging Face folder as the values that they stand for, rounded to one dtype.

    Of matrices below each other in one slot some may be plain, if the configuration says so.
    """

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return isinstance(checkpoint, FolderCheckpoint) and slot.columns is not None

    def stored_shapes(self, checkpoint: Checkpoint, slot: Slot) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for part in slot.parts:
            matrix = _quantized(checkpoint, slot, part)
            plain = slot._replace(parts=(part,))
            found |= matrix.stored_shapes() if matrix else super().stored_shapes(checkpoint, plain)
        return found

    def _copy(self, checkpoint: Checkpoint, slot: Slot, part: Part, out: torch.Tensor) -> None:
        matrix = _quantized(checkpoint, slot, part)
        if matrix:
            matrix.copy(out)
        else:
            super()._copy(checkpoint, slot, part, out)


class StoredMatrix:
    """A quantised matrix of a Hugging Face folder: which tensors it is stored as, and what they stand for."""

    def __init__(self, checkpoint: FolderCheckpoint, slot: Slot, part: Part, scheme: Scheme) -> None:
        """Raises `ModelFileError` for a matrix that has no such layout."""
        self._checkpoint, self._part, self._scheme = checkpoint, part, scheme
        self._columns = slot.columns or WHOLE.share(1)
        self._plain = stored_name(checkpoint, part, slot.layer)
        self._layout = LAYOUTS[scheme.layout]
        try:
            wanted = self._layout.stored(scheme, *slot.stored_shape(part))
        except ValueError as error:
            raise ModelFileError(checkpoint.path, f"{self._plain}: {error}") from None
        self._wanted = {self._name(suffix): (suffix, stored) for suffix, stored in wanted.items()}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those that are needed or there. Raises `ModelFileError` for other dtypes, and a plain matrix."""
        if self._plain not in self._wanted and self._checkpoint.find(self._plain):
            raise self._error(self._plain, f"is there, although {KEY} quantises this module")
        found = {}
        for name, (_, wanted) in self._wanted.items():
            tensor = self._checkpoint.find(name)
            if tensor is None:
                if wanted.needed:
                    found[name] = wanted.shapes[0]
                continue
            if tensor.dtype not in wanted.dtypes:
                names = " or ".join(wanted.dtypes)
                raise self._error(name, f"is stored as {tensor.dtype}, but {KEY} asks for {names}")
            found[name] = tensor.shape if tensor.shape in wanted.shapes else wanted.shapes[0]
        return found

    def copy(self, out: torch.Tensor) -> None:
        """Write the values of the part's rows and the slot's columns: [rows, columns] of any dtype."""
        columns = range(*self._columns.runs[0])
        step = max(32, CHUNK_ELEMENTS[out.device.type] // len(columns) // 32 * 32)
        tensors = {
            suffix: self._checkpoint.view(name)
            for name, (suffix, _) in self._wanted.items()
            if self._checkpoint.find(name)
        }
        filled = 0
        try:
            check(self._scheme, tensors, self._part.rows.stored, self._columns.stored)
            for first, last in self._part.rows.runs:
                for start in range(first, last, step):
                    rows = range(start, min(last, start + step))
                    values = self._layout.values(
                        self._scheme, tensors, Rectangle(rows, columns), str(out.device)
                    )
                    out[filled : filled + len(rows)].copy_(values)
                    filled += len(rows)
        except ValueError as error:
            suffix, _, problem = str(error).partition(" ")
            raise self._error(self._name(suffix), problem) from None
        for suffix in tensors:
            self._checkpoint.forget(self._name(suffix))

    def _name(self, suffix: str) -> str:
        name = f"{self._plain.removesuffix('weight')}{suffix}"
        if suffix == "weight_scale" and self._checkpoint.find(f"{name}_inv"):
            return f"{name}_inv"
        return name

    def _error(self, name: str, problem: str) -> ModelFileError:
        return ModelFileError(self._checkpoint.file_of(name), f"tensor {name} {problem}")


def _quantized(checkpoint: Checkpoint, slot: Slot, part: Part) -> StoredMatrix | None:
    """The stored matrix of a part that the configuration quantises."""
    if not isinstance(checkpoint, FolderCheckpoint):
        return None
    scheme = checkpoint.scheme(part, slot.layer)
    return StoredMatrix(checkpoint, slot, part, scheme) if scheme else None


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


FORMATS: tuple[WeightFormat, ...] = (Dequantized(), Dense())  # the first that accepts a slot loads it
PACKED = Packed()
