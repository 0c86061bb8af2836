"""Reads safetensors files, single or sharded, through a memory map.

The header is parsed here rather than by the `safetensors` package because the pages of each tensor can then
be released as soon as it was copied (a large model would otherwise be resident twice), and because a git-LFS
pointer, a web page or a pickle deserves a better message than "header too large". Imports no torch.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from microvllm.adapters.errors import ModelFileError, unreadable
from microvllm.adapters.files import sniff
from microvllm.adapters.files.fields import shorten
from microvllm.adapters.files.gguf_file import release_pages
from microvllm.adapters.files.hf_config import read_json
from microvllm.adapters.files.regular_files import check_regular

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors package too
MAX_DIMENSIONS = 8
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class StoredTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies: bytes [start, stop) of the file, row-major, little-endian."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


class SafetensorsFile:
    """One safetensors file: `tensors` by name, and the map that holds them.

    Raises `ModelFileError` for a header that is no JSON or does not describe exactly the bytes of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_regular(path)
            with path.open("rb") as file:
                head = file.read(64)
                if len(head) < 8:
                    raise ModelFileError(path, sniff.describe(head) or f"is only {len(head)} bytes long")
                # A private map is writable, which torch wants of a buffer; the file itself is never written.
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise ModelFileError(path, "no such file") from None
        except OSError as error:
            raise unreadable(path, error) from None
        self.tensors = self._tensor_table(head)

    def forget(self, name: str) -> None:
        """Give the memory of a tensor's mapped pages back; they are read again if needed."""
        tensor = self.tensors[name]
        release_pages(self.map, tensor.start, tensor.stop - tensor.start)

    def _tensor_table(self, head: bytes) -> dict[str, StoredTensor]:
        size = len(self.map)
        length = int.from_bytes(head[:8], "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            found = (
                sniff.describe(head) or f"claims a header of {length} bytes in a file of {size} (truncated?)"
            )
            raise ModelFileError(self.path, f"not a safetensors file: {found}")
        data_start = 8 + length
        tensors: dict[str, StoredTensor] = {}
        for name, entry in self._header(self.map[8:data_start]):
            if name == "__metadata__":
                continue
            if name in tensors:
                raise ModelFileError(self.path, f"tensor {shorten(name)} occurs twice")
            tensors[name] = self._entry(name, entry, data_start)
        end = data_start
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end:
                raise ModelFileError(
                    self.path, f"tensor {shorten(tensor.name)} does not begin where the one before ends"
                )
            end = tensor.stop
        if end != size:
            problem = "truncated" if end > size else "has bytes that belong to no tensor"
            raise ModelFileError(
                self.path, f"{problem}: the header describes {end} bytes, the file has {size}"
            )
        return tensors

    def _header(self, raw: bytes) -> list[tuple[str, Any]]:
        """The header's entries in order; pairs, since a dictionary would hide a name that occurs twice."""
        entries: list[tuple[str, Any]]
        try:
            # Only the outermost object stays a list of pairs: it is the last one that the hook sees.
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_Pairs)
        except UnicodeDecodeError:
            raise ModelFileError(self.path, "the header is not UTF-8") from None
        except RecursionError:
            raise ModelFileError(self.path, "the header is not usable JSON: nested too deeply") from None
        except ValueError as error:
            raise ModelFileError(self.path, f"the header is not JSON ({error})") from None
        if not isinstance(header, _Pairs):
            raise ModelFileError(self.path, "the header is not a JSON object")
        entries = [(name, dict(value) if isinstance(value, _Pairs) else value) for name, value in header]
        return entries

    def _entry(self, name: str, entry: Any, data_start: int) -> StoredTensor:
        where = f"tensor {shorten(name)}"
        if not isinstance(entry, dict):
            raise ModelFileError(self.path, f"{where}: its entry in the header is not an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
            raise ModelFileError(
                self.path, f"{where} is stored as {shorten(dtype)}; supported are {', '.join(ELEMENT_BYTES)}"
            )
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise ModelFileError(self.path, f"{where}: shape or data_offsets are not lists of sizes")
        if len(shape) > MAX_DIMENSIONS:  # multiplying millions of them would take hours
            raise ModelFileError(
                self.path, f"{where} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
            )
        start, stop = offsets
        if stop - start != math.prod(shape) * ELEMENT_BYTES[dtype]:
            raise ModelFileError(
                self.path, f"{where}: {stop - start} bytes do not hold {dtype} of shape {shape}"
            )
        return StoredTensor(name, tuple(shape), dtype, data_start + start, data_start + stop)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its list of pairs."""


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def open_folder(folder: Path) -> dict[str, SafetensorsFile]:
    """Open the checkpoint of a folder: which file holds which tensor.

    `model.safetensors` if it is there, else the files named by `model.safetensors.index.json`, else all
    `*.safetensors`. Raises `ModelFileError` for missing shards, tensors in two files, and folders that hold
    only pickles: loading those can run code, whatever they are called.
    """
    paths = [folder / SINGLE_NAME]
    index: dict[str, Any] = {}
    if not paths[0].exists():
        if (folder / INDEX_NAME).exists():
            index = _weight_map(folder / INDEX_NAME)
            paths = [folder / name for name in sorted(set(index.values()))]
        else:
            paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
        if pickles:
            raise ModelFileError(
                folder,
                f"holds its weights only as pickle ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors",
            )
        raise ModelFileError(folder, "holds no *.safetensors files")
    holders: dict[str, SafetensorsFile] = {}
    for path in paths:
        file = SafetensorsFile(path)
        for name in file.tensors:
            if name in holders:
                raise ModelFileError(path, f"tensor {shorten(name)} is also in {holders[name].path.name}")
            holders[name] = file
    for name, file_name in index.items():
        if name not in holders or holders[name].path.name != file_name:
            raise ModelFileError(
                folder / file_name, f"lacks tensor {shorten(name)}, which {INDEX_NAME} places there"
            )
    return holders


def _weight_map(path: Path) -> dict[str, str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelFileError(path, "weight_map is missing or empty")
    for file_name in names.values():
        # A path would let the index reach files outside of the folder.
        plain = isinstance(file_name, str) and Path(file_name).name == file_name and "\0" not in file_name
        if not plain or not file_name.endswith(".safetensors"):
            raise ModelFileError(
                path, f"weight_map names {shorten(file_name)}, which is not a plain file name *.safetensors"
            )
    return names
