"""Lists the formats in which weights are kept in memory, and loads each.

The kind of tensor that a format loads decides the product: a plain tensor is multiplied by every device's
`Operators.linear`, a subclass by the operators that list it in `Operators.packed`; for others its format is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from microvllm.adapters.errors import ModelFileError, NoMemoryError
from microvllm.adapters.files.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    GGUFCheckpoint,
    stored_name,
)
from microvllm.adapters.files.quantization import KEY, Scheme
from microvllm.adapters.formats.dequantize import CHUNK_ELEMENTS, LAYOUTS, PACKED_LAYOUTS, Rectangle, check
from microvllm.adapters.tensors import WHOLE, Part, Slot
from microvllm.ops.coded import pack
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.scaled import E4M3, ScaledTensor, quantize


class WeightFormat(Protocol):
    """How a tensor of the model is loaded and kept.

    `kind`: the class of tensor that matrices are loaded as.
    """

    kind: type[torch.Tensor]

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

    kind: type[torch.Tensor] = torch.Tensor

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
        self._checkpoint, self._part, self.scheme = checkpoint, part, scheme
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
        filled = 0
        with self._checked() as tensors:
            for at in self._rectangles(out.device.type):
                values = self._layout.values(self.scheme, tensors, at, str(out.device))
                out[filled : filled + len(values)].copy_(values)
                filled += len(values)

    def order(self) -> torch.Tensor | None:
        """The stored columns, group by group: [columns] int64; None if others than the last are not full."""
        names = [name for name, (suffix, _) in self._wanted.items() if suffix.endswith("g_idx")]
        if not all(map(self._checkpoint.find, names)):
            return None
        index = self._checkpoint.view(names[0]).long()
        size = self.scheme.block[1] or len(index)
        order = index.argsort(stable=True)
        full = index[order].equal(torch.arange(len(index)) // size)
        return order if full else None

    def copy_words(
        self, out: torch.Tensor, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of packed codes, write the words of a `CodedTensor` whose columns are in this order.

        Returns each row's scales, [rows, groups] of the stored dtype, and its zero points, uint8 or None.
        """
        layout, device = PACKED_LAYOUTS[self.scheme.layout], str(out.device)
        filled, scales, zeros = 0, [], []
        with self._checked() as tensors:
            dtype = next(tensors[name].dtype for name in ("scales", "weight_scale") if name in tensors)
            for at in self._rectangles(out.device.type):
                found = layout.codes(self.scheme, tensors, at, device)
                codes = found.codes if order is None else found.codes[:, order.to(device)]
                out[filled : filled + len(codes)].copy_(pack(codes.to(torch.uint8), self.scheme.bits))
                filled += len(codes)
                groups = slice(int(found.group.min()), int(found.group.max()) + 1)
                scales.append(found.scales[:, groups].to(dtype))
                if found.zeros is not None:
                    zeros.append(found.zeros[:, groups].to(torch.uint8))
        return torch.cat(scales), torch.cat(zeros) if zeros else None

    def _rectangles(self, device: str) -> Iterator[Rectangle]:
        """The part's rows, some at a time, and the slot's columns."""
        columns = range(*self._columns.runs[0])
        step = max(32, CHUNK_ELEMENTS[device] // len(columns) // 32 * 32)
        for first, last in self._part.rows.runs:
            for start in range(first, last, step):
                yield Rectangle(range(start, min(last, start + step)), columns)

    def copy_codes(self, out: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Of a "scaled" matrix, write the codes of the part's rows and the slot's columns as they are.

        Returns the scales of each row, [rows, blocks of columns] float32, and the scale of activations, 0
        where none is stored.
        """
        (start, stop), (height, width) = self._columns.runs[0], self.scheme.block
        pieces = torch.split(out, self._part.rows.lengths)
        with self._checked() as tensors:
            stored = tensors["weight_scale"].float()
            stored = stored.reshape(stored.shape[0] if stored.ndim else 1, -1)
            if width:
                stored = stored[:, start // width : -(-stop // width)]
            scales = []
            for (first, last), piece in zip(self._part.rows.runs, pieces, strict=True):
                piece.copy_(tensors["weight"][first:last, start:stop])
                rows = torch.arange(first, last)
                scales.append(stored[rows // height if height else torch.zeros_like(rows)])
            inputs = [tensors[name] for name in ("input_scale", "activation_scale") if name in tensors]
            return torch.cat(scales), float(inputs[0]) if inputs else 0.0

    @contextmanager
    def _checked(self) -> Iterator[dict[str, torch.Tensor]]:
        """The stored tensors by the last part of their names; a ValueError about one names its file."""
        tensors = {
            suffix: self._checkpoint.view(name)
            for name, (suffix, _) in self._wanted.items()
            if self._checkpoint.find(name)
        }
        try:
            check(self.scheme, tensors, self._part.rows.stored, self._columns.stored)
            yield tensors
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


class Scaled(Dequantized):
    """Matrices in e4m3 as they are stored: `ScaledTensor`.

    Not those of which a part is plain or quantised otherwise, or whose blocks a shard cuts: `Dequantized` is
    for them.
    """

    kind: type[torch.Tensor] = ScaledTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        if not isinstance(checkpoint, FolderCheckpoint) or slot.columns is None:
            return False
        first, *others = (checkpoint.scheme(part, slot.layer) for part in slot.parts)
        if first is None or first.layout != "scaled" or not first.is_float:
            return False
        width = first.block[1]
        return all(scheme == first for scheme in others) and not (width and slot.columns.runs[0][0] % width)

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        codes = allocate(checkpoint.path, slot.name, slot.shape, E4M3, device)
        scales, inputs = [], []
        pieces = torch.split(codes, [part.rows.size for part in slot.parts])
        scheme = Scheme(layout="scaled")
        for part, piece in zip(slot.parts, pieces, strict=True):
            if matrix := _quantized(checkpoint, slot, part):
                found, of_input = matrix.copy_codes(piece)
                scales.append(found)
                inputs.append(of_input)
                scheme = matrix.scheme
            loaded()
        # Where runs of rows begin in the slot, and in the blocks of the file.
        runs = [run for part in slot.parts for run in part.rows.runs]
        starts = accumulate((stop - start for start, stop in runs), initial=0)
        begins = [*list(starts)[:-1], *(start for start, _ in runs)]
        return _scaled(scheme, codes, torch.cat(scales), begins, inputs)


def _scaled(
    scheme: Scheme,
    codes: torch.Tensor,
    scales: torch.Tensor,
    begins: Sequence[int],
    inputs: Sequence[float] = (0.0,),
) -> ScaledTensor:
    """scales: of each row, [rows, blocks of columns] float32; inputs: of each part's activations, or 0.

    begins: rows that begin a block; if all are multiples of its height, one row stands for all of a block.
    """
    (height, width), activations = scheme.block, scheme.activations
    if activations == "tensor" and min(inputs) <= 0:
        activations = "token"  # static scales that are missing or no scales
    height = height if height > 1 and not any(begin % height for begin in begins) else 1
    scales = scales[::height].to(codes.device).contiguous()
    return ScaledTensor.of(codes, scales, (height, width or codes.shape[1]), activations, max(inputs))


class RoundedPacked(Dense):
    """Plain matrices that are quantised as they are loaded, each part by itself: `ScaledTensor`.

    A shard's scales are of its own part of a block.
    """

    kind: type[torch.Tensor] = ScaledTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return self._scheme(checkpoint, slot) is not None

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        plain = super().load(checkpoint, slot, dtype, device, loaded)
        scheme = self._scheme(checkpoint, slot)
        try:
            return plain if scheme is None else round_matrix(slot, plain, scheme)
        except ValueError as error:
            names = [stored_name(checkpoint, part, slot.layer) for part in slot.parts]
            raise ModelFileError(checkpoint.path, f"tensor {' or '.join(names)} {error}") from None

    def _scheme(self, checkpoint: Checkpoint, slot: Slot) -> Scheme | None:
        if not isinstance(checkpoint, FolderCheckpoint) or slot.columns is None:
            return None
        return checkpoint.scheme_on_loading(slot.parts[0], slot.layer)


class Rounded(RoundedPacked):
    """The same as the values that the codes stand for."""

    kind: type[torch.Tensor] = torch.Tensor

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        made = super().load(checkpoint, slot, dtype, device, loaded)
        return made.dequantized(dtype) if isinstance(made, ScaledTensor) else made


def round_matrix(slot: Slot, plain: torch.Tensor, scheme: Scheme) -> ScaledTensor:
    """Quantise a loaded slot, each part by itself. Raises ValueError for values that are not finite."""
    (height, _), sizes = scheme.block, [part.rows.size for part in slot.parts]
    codes = torch.empty(plain.shape, dtype=E4M3, device=plain.device)
    scales = []
    for source, target in zip(torch.split(plain, sizes), torch.split(codes, sizes), strict=True):
        rounded, found = quantize(source, scheme.block)
        target.copy_(rounded)
        scales.append(found.repeat_interleave(height or len(source), 0)[: len(source)])
    joined = torch.cat(scales)
    if not joined.isfinite().all():
        raise ValueError("has values that are not finite, which cannot be quantised")
    return _scaled(scheme, codes, joined, list(accumulate(sizes, initial=0))[:-1])


class Packed(Dense):
    """ggml's blocks as a GGUF file has them: a `QuantizedTensor`, on the CPU.

    Vectors and routers, whose rounding could choose other experts, are float32. What makes keys and values of
    latents is multiplied head by head, and so not in blocks.

    Nothing in such a file is rounded, unless it has matrices that are not quantised.
    """

    kind: type[torch.Tensor] = QuantizedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return (
            isinstance(checkpoint, GGUFCheckpoint)
            and slot.name.rpartition(".")[2] not in BY_HEAD
            and (slot.columns is None or _is_router(slot) or checkpoint.is_quantized(slot))
        )

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or _is_router(slot) or not isinstance(checkpoint, GGUFCheckpoint):
            return super().load(checkpoint, slot, torch.float32, device, loaded)
        names = [stored_name(checkpoint, part, slot.layer) for part in slot.parts]
        stored = list(zip(names, slot.parts, strict=True))
        rows = tuple(checkpoint.quantized_rows(name, part, slot.columns) for name, part in stored)
        sizes = [one.rows * one.row_bytes for one in rows]
        data = allocate(checkpoint.path, slot.name, (sum(sizes),), torch.uint8, "cpu")
        for (name, part), piece in zip(stored, torch.split(data, sizes), strict=True):
            checkpoint.copy_quantized(name, part, slot.columns, piece)
            loaded()
        if len(rows) == 1 and slot.name.endswith(".gate_up"):  # both in one stored tensor
            rows = (rows[0]._replace(rows=rows[0].rows // 2),) * 2
        return QuantizedTensor.of(data, slot.columns.size, rows)


BY_HEAD = ("k_b", "v_b")


def _is_router(slot: Slot) -> bool:
    return slot.parts[0].role == "router"


def allocate(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An uninitialised tensor. Raises `NoMemoryError` naming the model and the tensor if memory is short."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:
        size = math.prod(shape) * dtype.itemsize / 1e6
        raise NoMemoryError(path, f"no memory for {name} {list(shape)} ({size:,.0f} MB)") from None


# Of those whose kind of tensor the operators multiply, the first that accepts a slot loads it.
FORMATS: tuple[WeightFormat, ...] = (
    Packed(),
    Scaled(),
    RoundedPacked(),
    Rounded(),
    Dequantized(),
    Dense(),
)
