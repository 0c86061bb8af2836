"""Opens the two kinds of checkpoints: a folder of safetensors files, and a GGUF file.

Each gives named tensors, converted to a dtype as they are copied. Rotary halves come out as Hugging Face's:
dimension j of a head is rotated with dimension j + D/2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch

from microvllm.adapters.errors import CutError, ModelFileError
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import shorten, warn_once
from microvllm.adapters.files.gguf_file import TENSOR_TYPES, GGUFFile
from microvllm.adapters.files.gguf_spec import DRAFTS
from microvllm.adapters.files.quantization import KEY as QUANTIZATION_KEY
from microvllm.adapters.files.quantization import LINEAR, Quantization, Scheme
from microvllm.adapters.files.safetensors_file import StoredTensor, open_folder
from microvllm.adapters.registry import BY_GGUF_NAME
from microvllm.adapters.rope_spec import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import BARE, PAIRS, Cut, Part, Slot
from microvllm.ops.quantized import QuantizedRows

CHUNK_ELEMENTS = 1 << 17  # dequantised at a time: large enough to be fast, small enough to stay in cache
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH_DTYPES = {
    **PLAIN_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Checkpoint(Protocol):
    """Named tensors on disk; `names` maps roles to the names in this checkpoint."""

    path: Path
    names: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def may_be_unused(self, name: str) -> bool: ...
    def has_own_head(self) -> bool:
        """Whether there is a head that differs from the embeddings, as a fine-tune may have untied them."""
        ...

    def file_of(self, name: str) -> Path: ...
    def check_plain(self, name: str) -> None:
        """Raise `ModelFileError` for a tensor, if it is there, whose dtype needs more than a conversion."""
        ...

    def copy(self, name: str, part: Part, columns: Cut | None, out: torch.Tensor) -> None:
        """Convert the part's rows, of these columns, of a stored tensor to `out`, and drop its pages."""
        ...


def stored_name(checkpoint: Checkpoint, part: Part, layer: int) -> str:
    """Return the name under which the checkpoint stores a part of a layer."""
    is_bare = checkpoint.names[part.role].endswith(BARE)
    suffix = ("", "_bias")[part.bias] if is_bare else (".weight", ".bias")[part.bias]
    return module_name(checkpoint.names, part, layer) + suffix


def module_name(names: Mapping[str, str], part: Part, layer: int) -> str:
    """Return the name of the module that a part of a layer belongs to."""
    return names[part.role].format(i=layer, e=part.expert, bare="", transposed="")


def scheme_of(quantization: Quantization, names: Mapping[str, str], part: Part, layer: int) -> Scheme | None:
    """How the matrix of a part is quantised; None for a bias and for what stays plain."""
    module = module_name(names, part, layer)
    return None if part.bias else quantization.scheme_of(part.role, module)


class FolderCheckpoint:
    """The safetensors files of a Hugging Face folder."""

    # Older checkpoints carry the rotary frequencies, which follow from the configuration.
    _IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")

    def __init__(
        self, folder: Path, family: Family, quantization: Quantization | None = None, num_layers: int = 0
    ) -> None:
        self.path = folder
        on_loading = quantization is not None and quantization.on_loading
        self.quantization = None if on_loading else quantization
        self._on_loading = quantization if on_loading else None
        self._files = open_folder(folder)
        self._unused = tuple(start.format(n=num_layers) for start in family.hf_unused)
        used = [name for name in self._files if not name.startswith(self._unused)]
        self.names, self._wrapper = _as_stored(_stacked(family, used), used)
        if left_out := [name for name in self._files if name.startswith(self._unused)]:
            warn_once(f"{folder}: {listed(left_out)} left out on purpose: this engine does not use them")
        outside = [name for name in used if self._is_outside(name)]
        if outside:
            warn_once(
                f"{folder}: {listed(outside)} outside of {self._wrapper}* and not used: the language model "
                "alone is served"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.tensors[name].shape for name, file in self._files.items()}

    def may_be_unused(self, name: str) -> bool:
        return (
            self._is_outside(name)
            or name.startswith(self._unused)
            or self._IGNORED.fullmatch(name) is not None
            or self._is_empty_bias(name)
        )

    def has_own_head(self) -> bool:
        head, embed = (f"{self.names[role]}.weight" for role in ("lm_head", "embed"))
        if head not in self._files or embed not in self._files:
            return False
        matrices = self.view(head), self.view(embed)
        if matrices[0].dtype != matrices[1].dtype:
            matrices = matrices[0].float(), matrices[1].float()
        same = torch.equal(*matrices)
        self.forget(head)
        self.forget(embed)
        return not same

    def file_of(self, name: str) -> Path:
        return self._files[name].path

    def scheme(self, part: Part, layer: int) -> Scheme | None:
        """How the matrix of a part is quantised; None if it is plain."""
        if self.quantization is None:
            return None
        scheme = scheme_of(self.quantization, self.names, part, layer)
        # What is no module's weight is quantised in MXFP4 alone.
        is_bare = self.names[part.role].endswith(BARE)
        return None if is_bare and scheme is not None and scheme.layout != "mxfp4" else scheme

    def scheme_on_loading(self, part: Part, layer: int) -> Scheme | None:
        """How the plain matrix of a part is to be quantised; None if it stays as it is."""
        if self._on_loading is None or part.bias:
            return None
        if part.expert is None:
            return scheme_of(self._on_loading, self.names, part, layer)
        return self._on_loading.scheme_of_experts(self.quantized_module(part, layer))

    def quantized_module(self, part: Part, layer: int) -> str:
        """The module by whose name loading quantises the matrix of a part: of experts what holds them all."""
        module = module_name(self.names, part, layer)
        head, experts, _ = module.partition(".experts")
        return head + experts if part.expert is not None else module

    def check_on_loading(self, slots: Iterable[Slot]) -> None:
        """Raise `ModelFileError` where targets name no matrix, or a product's matrices differ in theirs."""
        if self._on_loading is None:
            return
        unused = {target for names, _ in self._on_loading.groups for target in names} - {LINEAR}
        count = 0
        for slot in slots:
            parts = [part for part in slot.parts if slot.columns is not None and not part.bias]
            schemes = {self.scheme_on_loading(part, slot.layer) for part in parts}
            modules = list(dict.fromkeys(self.quantized_module(part, slot.layer) for part in parts))
            count += schemes != {None} and bool(schemes)
            if len(schemes) > 1:
                problem = "are one product, which has one format: --quantization-config gives them several"
                raise ModelFileError(self.path, f"{', '.join(modules)} {problem}")
            for module in modules:
                found = self._on_loading.targets_of(module)
                unused.difference_update(found)
                if len(found) > 1:
                    problem = f"is named by several targets of --quantization-config: {', '.join(found)}"
                    raise ModelFileError(self.path, f"{module} {problem}")
        if unused:
            problem = f"targets of --quantization-config name no matrix: {', '.join(sorted(unused))}"
            raise ModelFileError(self.path, problem)
        if not count:
            raise ModelFileError(self.path, "no matrix is left that --quantization-config quantises")

    def find(self, name: str) -> StoredTensor | None:
        """The entry of a tensor in the header of its file; None if there is no such tensor."""
        file = self._files.get(name)
        return file.tensors[name] if file else None

    def check_plain(self, name: str) -> None:
        tensor = self.find(name)
        if tensor is None or tensor.dtype in PLAIN_DTYPES:
            return
        problem = f"tensor {name} is stored as {tensor.dtype}"
        if self.quantization is None:
            raise ModelFileError(
                self.file_of(name),
                f"{problem}, and config.json has no {QUANTIZATION_KEY}; without one supported are "
                f"{', '.join(PLAIN_DTYPES)}",
            )
        raise ModelFileError(
            self.file_of(name), f"{problem}, although {QUANTIZATION_KEY} does not quantise this module"
        )

    def copy(self, name: str, part: Part, columns: Cut | None, out: torch.Tensor) -> None:
        stored, cut = self.view(name), part.rows
        if part.stacked and part.expert is not None:
            stored, cut = stored[part.expert], part.own_rows
            stored = stored.T if part.transposed else stored
        elif part.stacked:  # a matrix with a dimension of 1 in its middle
            stored = stored.flatten(0, 1)
        for rows, piece in zip(cut.runs, torch.split(out, cut.lengths), strict=True):
            run = stored[slice(*rows)]
            run = run if columns is None else run[:, slice(*columns.runs[0])]
            piece.copy_(torch.cat((run[::2], run[1::2])) if part.role == PAIRS else run)
        self.forget(name)

    def view(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype and shape: a view of the file."""
        file = self._files[name]
        tensor = file.tensors[name]
        dtype, count = TORCH_DTYPES[tensor.dtype], math.prod(tensor.shape)
        if count == 0:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(file.map, dtype=dtype, count=count, offset=tensor.start).view(tensor.shape)

    def forget(self, name: str) -> None:
        """Give the memory of a viewed tensor's pages back."""
        self._files[name].forget(name)

    def _is_empty_bias(self, name: str) -> bool:
        """Whether a tensor is one of the zeros that GPTQ's writers add to modules without a bias."""
        if self.quantization is None or self.quantization.method != "gptq" or not name.endswith(".bias"):
            return False
        return f"{name.removesuffix('bias')}qweight" in self._files and not self.view(name).any()

    def _is_outside(self, name: str) -> bool:
        """Whether a tensor belongs to another part of the model that the language model was wrapped in."""
        head = f"{self.names['lm_head']}.weight"
        return self._wrapper is not None and not name.startswith(self._wrapper) and name != head


def _stacked(family: Family, stored: Collection[str]) -> Mapping[str, str]:
    """The names of the roles, of experts in one tensor where there are such tensors."""
    endings = [name.removesuffix(BARE).rpartition("}.")[2] for name in family.hf_stacked.values()]
    are_stacked = endings and all(any(name.endswith(ending) for name in stored) for ending in endings)
    return {**family.hf_tensors, **family.hf_stacked} if are_stacked else family.hf_tensors


def _as_stored(names: Mapping[str, str], stored: Iterable[str]) -> tuple[Mapping[str, str], str | None]:
    """The names of the roles in this checkpoint, and the prefix that wraps all but the head.

    A text model that was cut out of a larger one keeps its prefix there ("language_model.model.",
    "model.language_model."), and one that was saved without its head may have none. The embeddings show it.
    The prefix is None where the names are the family's own or have no prefix at all.
    """
    base, _, leaf = names["embed"].rpartition(".")
    stored = set(stored)
    found = [name for name in stored if f".{name}".endswith(f".{leaf}.weight")]
    if f"{names['embed']}.weight" in found or len(found) != 1:
        return names, None
    prefix = found[0].removesuffix(f"{leaf}.weight")
    renamed = {
        role: prefix + name.removeprefix(f"{base}.") if name.startswith(f"{base}.") else name
        for role, name in names.items()
    }
    outer = prefix.removesuffix(f"{base}.")
    for head in (f"{outer}lm_head", f"{prefix}lm_head"):
        if f"{head}.weight" in stored:
            renamed["lm_head"] = head
    return renamed, prefix or None


class GGUFCheckpoint:
    """A GGUF file, copied as it is or dequantised piece by piece."""

    # Rotary factors become part of the spec.
    _IGNORED = (LLAMA3_TENSOR, SHORT_TENSOR, LONG_TENSOR)

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._head_dim = spec.mixers[0].head_dim if spec.mixers else 0
        family = BY_GGUF_NAME[self._file.architecture]
        self.names, self._interleaved = family.gguf_tensors, family.gguf_interleaved
        drafts = self._file.metadata.get(f"{self._file.architecture}.{DRAFTS}", 0)
        self._unused = tuple(f"blk.{spec.num_layers + index}." for index in range(drafts))
        if left_out := [name for name in self._file.tensors if name.startswith(self._unused)]:
            warn_once(f"{path}: {listed(left_out)} left out on purpose: this engine does not use them")
        # The gate of a shared expert, a matrix of one row, is stored as a vector, and the convolution of each
        # channel without the dimension of its one input.
        for name, tensor in self._file.tensors.items():
            shape = tensor.shape
            if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1:
                self._file.tensors[name] = msgspec.structs.replace(tensor, shape=(1, *shape))
            if name.endswith(("shortconv.conv.weight", "ssm_conv1d.weight")) and len(shape) == 2:
                self._file.tensors[name] = msgspec.structs.replace(tensor, shape=(shape[0], 1, shape[1]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._file.tensors.items()}

    def may_be_unused(self, name: str) -> bool:
        return name in self._IGNORED or name.startswith(self._unused)

    def has_own_head(self) -> bool:
        return False  # such a file is a tied model only if it has no head

    def file_of(self, name: str) -> Path:
        return self._file.file_of(name)

    def check_plain(self, name: str) -> None:
        """Every type that a file may have is read."""

    def type_of(self, slot: Slot, part: Part) -> tuple[str, int, int]:
        """A part's type: ggml's name, such as Q4_0, and the elements and the bytes of a block."""
        return TENSOR_TYPES[self._file.tensors[stored_name(self, part, slot.layer)].type_id]

    def is_quantized(self, slot: Slot) -> bool:
        """Whether all stored tensors of a matrix are in ggml's block formats."""
        tensors = (self._file.tensors.get(stored_name(self, part, slot.layer)) for part in slot.parts)
        return slot.columns is not None and all(tensor and tensor.is_quantized for tensor in tensors)

    def quantized_rows(self, name: str, part: Part, columns: Cut) -> QuantizedRows:
        """The format and the size of what `copy_quantized` copies."""
        kind = self._file.tensors[name].type_id
        return QuantizedRows(kind, part.rows.size, sum(map(len, self._block_bytes(name, columns))))

    def copy_quantized(self, name: str, part: Part, columns: Cut, out: torch.Tensor) -> None:
        """out: [bytes] uint8, the blocks of the part's rows, of these columns."""
        raw = self._file.raw_rows(name)
        places = self._block_bytes(name, columns)
        raw = raw[:, places[0].start : places[0].stop] if len(places) == 1 else raw[:, np.concatenate(places)]
        pieces = torch.split(out.view(part.rows.size, -1), part.rows.lengths)
        for run, piece in zip(part.rows.runs, pieces, strict=True):
            rows = raw[slice(*run)]
            if self._is_turned(part):
                # Blocks do not cross rows, so that rows can change places as they are; see `copy`.
                rows = rows.reshape(-1, self._head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2)
            np.copyto(piece.numpy().reshape(rows.shape), rows)
        self._file.forget(name)

    def _block_bytes(self, name: str, columns: Cut) -> list[range]:
        """Where the blocks of each run of columns lie in a row. `CutError` for a cut through a block."""
        kind, block, block_bytes = TENSOR_TYPES[self._file.tensors[name].type_id]
        for column in (end for run in columns.runs for end in run):
            if column % block:
                raise CutError(
                    self.path, f"tensor {name} in blocks of {block} ({kind}) cannot be cut at column {column}"
                )
        return [
            range(start // block * block_bytes, stop // block * block_bytes) for start, stop in columns.runs
        ]

    def copy(self, name: str, part: Part, columns: Cut | None, out: torch.Tensor) -> None:
        if part.stacked and columns is None:  # the biases of all experts
            entries = torch.from_numpy(self._file.tensor(name).ravel().copy())
            out.copy_(torch.cat([entries[slice(*run)] for run in part.rows.runs]))
            return
        width = columns.stored if columns else 1
        step = max(1, CHUNK_ELEMENTS // width)
        if turned := self._is_turned(part):
            step = max(1, step // self._head_dim) * self._head_dim
        filled = 0
        for first, last in part.rows.runs:
            for start in range(first, last, step):
                stop = min(last, start + step)
                values = self._file.rows(name, start, stop)
                # float32 rows are a read-only view of the file, which torch would warn about.
                source = torch.from_numpy(values if values.flags.writeable else values.copy())
                source = source.view(stop - start, width)
                if turned:
                    # Stored row 2 j + t of a head is row j + t D/2: pairs are neighbours there, halves here.
                    source = source.view(-1, self._head_dim // 2, 2, width).transpose(1, 2)
                    source = source.reshape(stop - start, width)
                if columns:
                    runs = [source[:, slice(*run)] for run in columns.runs]
                    source = runs[0] if len(runs) == 1 else torch.cat(runs, 1)
                if part.role == "delta_a_log":
                    source = self._logarithms(name, source)
                piece = out[filled : filled + stop - start]
                piece.copy_(source.reshape(piece.shape))
                filled += stop - start
        self._file.forget(name)

    def _logarithms(self, name: str, decays: torch.Tensor) -> torch.Tensor:
        """-exp(a_log), as which the decays of a delta rule are stored, -> a_log."""
        if not (decays < 0).all():
            raise ModelFileError(self.file_of(name), f"tensor {name} has decays that are not below 0")
        return (-decays).log()

    def _is_turned(self, part: Part) -> bool:
        return self._interleaved and part.role in ("q", "k")


def listed(names: list[str]) -> str:
    """Return the subject and verb of a sentence: "tensor a is", "tensors a, b, c and 5 more are"."""
    shown = ", ".join(shorten(name)[1:-1] for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{more} are"
