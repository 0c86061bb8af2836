"""Opens a GGUF file without trusting it; the format is ggml's docs/gguf.md, versions 2 and 3, little-endian.

The header is walked by hand because every count, length and offset in it must be checked against the size
of the file before it is used, and because `gguf.GGUFReader` takes seconds over a large vocabulary. Only the
arithmetic of the quantised formats is taken from the `gguf` package. Imports no torch.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from microvllm.adapters.errors import ModelFileError, unreadable
from microvllm.adapters.files import sniff
from microvllm.adapters.files.fields import shorten
from microvllm.adapters.files.regular_files import check_regular

MAX_ENTRIES = 1 << 20  # metadata entries or tensors: a thousand times what a large model has
MAX_ARRAY = 1 << 24
MAX_STRING = 16 << 20
MAX_NAME = 1 << 10
MAX_DIMENSIONS = 4
MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, the smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimension count, one dimension, type, offset
DEFAULT_ALIGNMENT = 32
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
U32, U64 = SCALARS[4], SCALARS[10]

# ggml's type number -> (name, elements in a block, bytes of a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}


class GGUFTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies.

    `shape` has the slowest dimension first, as in numpy; `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    type_id: int
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Of all its matrices; of a vector its entries."""
        return math.prod(self.shape[: max(1, len(self.shape) - 1)])

    @property
    def is_quantized(self) -> bool:
        return TENSOR_TYPES[self.type_id][1] > 1


class GGUFFile:
    """A GGUF file, memory-mapped; any part of a split one stands for all of them.

    `metadata` maps each key to a Python value (str, int, float, bool or a flat list of them), `tensors` each
    name to its `GGUFTensor`, `architecture` is `general.architecture`. Raises `ModelFileError` for anything
    that is malformed, truncated, big-endian, or stored in an unsupported type, and for parts that are missing
    or of different models.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _open_parts(path)
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        self._part_of: dict[str, _Part] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    holder = self._part_of[name].path.name
                    raise ModelFileError(part.path, f"tensor {shorten(name)} is also in {holder}")
                self.tensors[name], self._part_of[name] = tensor, part
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelFileError(parts[0].path, "general.architecture is missing or not a string")
        self.architecture: str = architecture

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._part_of[name].path

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a matrix, or entries of a vector, dequantised: float32 [stop - start, ...].

        Matrices in one tensor lie below each other. May be a read-only view of the file. Raises `KeyError` if
        there is no such tensor.
        """
        tensor = self.tensors[name]
        row_bytes = tensor.num_bytes // tensor.num_rows
        raw: npt.NDArray[np.uint8] = np.frombuffer(
            self._part_of[name].map,
            np.uint8,
            (stop - start) * row_bytes,
            tensor.offset + start * row_bytes,
        )
        if tensor.type == "F32":
            return raw.view("<f4").reshape(stop - start, *tensor.shape[1:][-1:])
        # Blocks never cross rows, so all rows can be handed over as one: with many short ones the package
        # spends its time on splitting them.
        from gguf import GGMLQuantizationType, quants  # 0.1 s, which reading the header alone need not pay

        values: npt.NDArray[np.float32] = quants.dequantize(raw, GGMLQuantizationType(tensor.type_id))
        return values.reshape(stop - start, *tensor.shape[1:][-1:])

    def raw_rows(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, row by row: [rows, bytes of a row], a read-only view of the file."""
        tensor = self.tensors[name]
        raw: npt.NDArray[np.uint8] = np.frombuffer(
            self._part_of[name].map, np.uint8, tensor.num_bytes, tensor.offset
        )
        return raw.reshape(tensor.num_rows, -1)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor, dequantised: float32 with the shape in the table."""
        tensor = self.tensors[name]
        return self.rows(name, 0, tensor.num_rows).reshape(tensor.shape)

    def forget(self, name: str) -> None:
        """Give the memory of a tensor's mapped pages back; they are read again if needed."""
        tensor = self.tensors[name]
        release_pages(self._part_of[name].map, tensor.offset, tensor.num_bytes)


class _Part:
    """One file: the whole model, or a part of it, which has the tensors in its own table alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_regular(path)
            with path.open("rb") as file:
                head = file.read(64)
                if head[:4] != b"GGUF":
                    found = sniff.describe(head) or f"it starts with {shorten(head[:4])} instead of 'GGUF'"
                    raise ModelFileError(path, f"not a GGUF file: {found}")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise unreadable(path, error) from None
        header = _Header(path, self.map)
        self.metadata = header.metadata()
        self.tensors = header.tensor_table(self._alignment())

    def split(self, key: str) -> int:
        """`split.{key}`, 0 if it is not there."""
        value = self.metadata.get(f"split.{key}", 0)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise ModelFileError(self.path, f"split.{key} must be a count, got {shorten(value)}")
        return value

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= 1 << 20 or value & (value - 1):
            raise ModelFileError(self.path, f"general.alignment must be a power of two, got {shorten(value)}")
        return value


def _open_parts(path: Path) -> list[_Part]:
    """All parts of the model that `path` is a part of, in their order; the first has the metadata.

    llama-gguf-split, which writes them, names them NAME-00001-of-00003.gguf, and numbers them in `split.no`.
    """
    given = _Part(path)
    count, number = given.split("count"), given.split("no")
    if count <= 1:
        return [given]
    match = PART_NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise ModelFileError(
            path,
            f"is part {number + 1} of {count}, but not named NAME-{number + 1:05}-of-{count:05}.gguf, "
            "by which the others are found",
        )
    paths = [path.with_name(f"{match[1]}-{index + 1:05}-of-{count:05}.gguf") for index in range(count)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelFileError(
            path, f"is one of {count} parts, of which are missing: {', '.join(missing[:3])}{more}"
        )
    parts = [given if one == path else _Part(one) for one in paths]
    architecture = parts[0].metadata.get("general.architecture")
    for index, part in enumerate(parts):
        if (part.split("count"), part.split("no")) != (count, index):
            raise ModelFileError(
                part.path,
                f"is part {part.split('no') + 1} of {part.split('count')}, other than its name says",
            )
        if part.metadata.get("general.architecture", architecture) != architecture:
            raise ModelFileError(part.path, f"is not of the same model as {paths[0].name}")
    expected, found = parts[0].split("tensors.count"), sum(len(part.tensors) for part in parts)
    if expected not in (0, found):
        raise ModelFileError(
            path,
            f"its {count} parts hold {found} tensors instead of {expected}: they are not of the same model",
        )
    return parts


class _Header:
    """A cursor over the header. No length is used before it was compared with what is left of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 4
        version = self._unpack(U32)
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise self._error("is big-endian, which is not supported")
            raise self._error(f"has GGUF version {version}; versions 2 and 3 are supported")
        self._num_tensors = self._unpack(U64)
        self._num_entries = self._unpack(U64)
        for what, count, least in (
            ("tensors", self._num_tensors, MIN_TENSOR_BYTES),
            ("metadata entries", self._num_entries, MIN_ENTRY_BYTES),
        ):
            if count > MAX_ENTRIES or count * least > self._size:
                raise self._error(f"claims {count} {what}, which do not fit the file of {self._size} bytes")

    def metadata(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(self._num_entries):
            key = self._string("a metadata key", MAX_NAME)
            if key in values:
                raise self._error(f"metadata key {shorten(key)} occurs twice")
            values[key] = self._value(key, self._unpack(U32))
        return values

    def tensor_table(self, alignment: int) -> dict[str, GGUFTensor]:
        """Read the tensor infos; to be called after `metadata()`."""
        infos = list(self._tensor_infos())
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in infos:
            if name in tensors:
                raise self._error(f"tensor {shorten(name)} occurs twice")
            type_name, block, block_bytes = self._tensor_type(name, type_id)
            if shape[-1] % block:
                raise self._error(
                    f"tensor {shorten(name)}: rows of {shape[-1]} do not fill {type_name} blocks of {block}"
                )
            elements = 1
            for length in shape:
                elements *= length
            num_bytes = elements // block * block_bytes
            if offset % alignment:
                raise self._error(f"tensor {shorten(name)}: offset {offset} is not a multiple of {alignment}")
            if start + offset + num_bytes > self._size:
                raise self._error(
                    f"tensor {shorten(name)} ends at byte {start + offset + num_bytes}, "
                    f"but the file has only {self._size} (truncated?)"
                )
            tensors[name] = GGUFTensor(name, shape, type_name, type_id, start + offset, num_bytes)
        return tensors

    def _tensor_infos(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for _ in range(self._num_tensors):
            name = self._string("a tensor name", MAX_NAME)
            num_dimensions = self._unpack(U32)
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise self._error(f"tensor {shorten(name)} has {num_dimensions} dimensions")
            lengths = [self._unpack(U64) for _ in range(num_dimensions)]
            if 0 in lengths:
                raise self._error(f"tensor {shorten(name)} has a dimension of 0")
            yield name, tuple(reversed(lengths)), self._unpack(U32), self._unpack(U64)

    def _tensor_type(self, name: str, type_id: int) -> tuple[str, int, int]:
        if type_id in TENSOR_TYPES:
            return TENSOR_TYPES[type_id]
        from gguf import GGMLQuantizationType

        known = {int(member): member.name for member in GGMLQuantizationType}
        type_name = known.get(type_id, f"number {type_id}")
        supported = ", ".join(name for name, _, _ in TENSOR_TYPES.values())
        raise self._error(f"tensor {shorten(name)} is stored as type {type_name}; supported are {supported}")

    def _value(self, key: str, type_id: int) -> Any:
        if type_id in SCALARS:
            return self._unpack(SCALARS[type_id])
        if type_id == STRING:
            return self._string(f"the value of {shorten(key)}", MAX_STRING)
        if type_id != ARRAY:
            raise self._error(f"metadata key {shorten(key)} has unknown type {type_id}")
        element, count = self._unpack(U32), self._unpack(U64)
        if element == ARRAY:
            raise self._error(f"metadata key {shorten(key)} is an array of arrays, which is not supported")
        if element not in SCALARS and element != STRING:
            raise self._error(f"metadata key {shorten(key)} is an array of unknown type {element}")
        least = 8 if element == STRING else SCALARS[element].size
        if count > MAX_ARRAY or count * least > self._size - self._at:
            raise self._error(
                f"metadata key {shorten(key)} claims {count} elements, which do not fit the file"
            )
        if element == STRING:
            what = f"an element of {shorten(key)}"  # once, as a vocabulary has 100,000 of them
            return [self._string(what, MAX_STRING) for _ in range(count)]
        scalar = SCALARS[element]
        dtype = np.dtype(np.bool_ if element == BOOL else scalar.format)
        values = np.frombuffer(self._data, dtype, count, self._at).tolist()
        self._at += count * scalar.size
        return values

    def _string(self, what: str, limit: int) -> str:
        length = self._unpack(U64)
        if length > limit or length > self._size - self._at:
            raise self._error(f"{what} claims {length} bytes, which is too long")
        end = self._at + length
        try:
            text = self._data[self._at : end].decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None
        self._at = end
        return text

    def _unpack(self, scalar: struct.Struct) -> Any:
        try:
            (value,) = scalar.unpack_from(self._data, self._at)
        except struct.error:
            raise self._error("ends in the middle of its header") from None
        self._at += scalar.size
        return value

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(self._path, problem)


def release_pages(mapped: mmap.mmap, offset: int, num_bytes: int) -> None:
    """Drop the whole pages within a range of a file mapping from this process's resident memory."""
    first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)
