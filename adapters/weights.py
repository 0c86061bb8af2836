"""Loads a checkpoint straight into the fused tensors that the decoder uses.

Result names, all of one dtype and contiguous, matrices as [out, in]:
`embed` [V, h], `lm_head` [V, h] (absent if tied, unless another matrix is stored), `norm` [h], and for every
layer i under `layers.{i}.`: `qkv` [(H + 2 Hkv) D, h], `o` [h, H D], `gate_up` [2 I, h], `down` [h, I],
`input_norm`, `post_norm` [h], `q_norm`, `k_norm` [D], and `qkv_bias`, `o_bias`, `gate_up_bias`, `down_bias`,
as far as the spec has them.
Rotary halves are Hugging Face's: dimension j of a head turns with dimension j + D/2.
Matrices that are kept as a GGUF file quantises them are `QuantizedTensor`s instead, of the same rows.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.fields import shorten, warn_once
from microvllm.adapters.gguf_file import GGUFFile
from microvllm.adapters.registry import BY_GGUF_NAME, BY_NAME
from microvllm.adapters.rope_spec import LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR
from microvllm.adapters.safetensors_file import open_folder
from microvllm.adapters.spec import ModelSpec
from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

Progress = Callable[[int, int], None]

CHUNK_ELEMENTS = 1 << 17  # dequantised at a time: large enough to be fast, small enough to stay in cache
DUMMY_STD = 0.02
DUMMY_POOL = (1 << 24) - 3  # prime to all row lengths in use, so that rows of one matrix differ

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Part(NamedTuple):
    """One tensor of the checkpoint: its role in `HF_TENSORS`, whether it is a bias, and the rows it fills."""

    role: str
    bias: bool
    rows: int


class Slot(NamedTuple):
    """One tensor of the result, made of one or more parts below each other."""

    name: str
    layer: int
    parts: tuple[Part, ...]
    columns: int | None  # None for a vector

    @property
    def shape(self) -> tuple[int, ...]:
        return self._with_columns(sum(part.rows for part in self.parts))

    def shape_of(self, part: Part) -> tuple[int, ...]:
        return self._with_columns(part.rows)

    def _with_columns(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.columns is None else (rows, self.columns)


class Checkpoint(Protocol):
    """Named tensors on disk."""

    path: Path

    def name(self, part: Part, layer: int) -> str: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def may_be_unused(self, name: str) -> bool: ...
    def has_own_head(self) -> bool: ...
    def file_of(self, name: str) -> Path: ...
    def copy(self, name: str, part: Part, out: torch.Tensor) -> None: ...


def load_weights(
    model: Path,
    spec: ModelSpec,
    load_format: str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    device: str = "cpu",
    *,
    keep_quantized: bool = False,
) -> dict[str, torch.Tensor]:
    """Load all weights as `dtype` on `device`; see the top of this file for names and shapes.

    `load_format` is "auto", "safetensors", "gguf" or "dummy" (random values, no file is read).
    With `keep_quantized`, matrices stay as a GGUF file quantises them, and vectors are float32: nothing in
    such a file is rounded, unless it has matrices that are not quantised, which are `dtype` all the same.
    `progress(done, total)` is called after every tensor of the checkpoint. Beside the result only the tensor
    being copied is resident. Raises `ModelFileError` for files that are malformed, and for tensors that are
    missing, of another shape than the spec says, or there but unused: a model computed without some of its
    weights would answer nonsense.
    """
    slots = list(checkpoint_slots(spec))
    if load_format == "dummy":
        return _dummy_weights(model, slots, dtype, progress, device)
    actual = "safetensors" if model.is_dir() else "gguf"
    if load_format not in ("auto", actual):
        raise ModelFileError(model, f"cannot be loaded as {shorten(load_format)}: it is {actual}")
    checkpoint: Checkpoint = (
        FolderCheckpoint(model, spec.architecture) if model.is_dir() else GGUFCheckpoint(model, spec.head_dim)
    )
    if spec.tie_embeddings and checkpoint.has_own_head():
        warn_once(
            f"{model}: lm_head.weight differs from the embeddings, which the configuration ties it to "
            "(tie_word_embeddings): the stored lm_head is used"
        )
        spec = msgspec.structs.replace(spec, tie_embeddings=False)
        slots = list(checkpoint_slots(spec))
    _check_names(checkpoint, spec, slots)
    count, total = itertools.count(1), sum(len(slot.parts) for slot in slots)

    def loaded() -> None:
        if progress is not None:
            progress(next(count), total)

    weights: dict[str, torch.Tensor] = {}
    for slot in slots:
        if keep_quantized and isinstance(checkpoint, GGUFCheckpoint) and checkpoint.is_quantized(slot):
            weights[slot.name] = _load_quantized(checkpoint, slot, loaded)
        else:
            exact = keep_quantized and slot.columns is None
            weights[slot.name] = _load(checkpoint, slot, torch.float32 if exact else dtype, device, loaded)
    return weights


def _load(
    checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
) -> torch.Tensor:
    tensor = _allocate(checkpoint.path, slot.name, slot.shape, dtype, device)
    pieces = torch.split(tensor, [part.rows for part in slot.parts])
    for part, piece in zip(slot.parts, pieces, strict=True):
        checkpoint.copy(checkpoint.name(part, slot.layer), part, piece)
        loaded()
    return tensor


def _load_quantized(checkpoint: GGUFCheckpoint, slot: Slot, loaded: Callable[[], None]) -> QuantizedTensor:
    rows = tuple(checkpoint.quantized_rows(checkpoint.name(part, slot.layer)) for part in slot.parts)
    sizes = [one.rows * one.row_bytes for one in rows]
    data = _allocate(checkpoint.path, slot.name, (sum(sizes),), torch.uint8, "cpu")
    for part, piece in zip(slot.parts, torch.split(data, sizes), strict=True):
        checkpoint.copy_quantized(checkpoint.name(part, slot.layer), part, piece)
        loaded()
    return QuantizedTensor.of(data, slot.shape[1], rows)


def checkpoint_slots(spec: ModelSpec) -> Iterator[Slot]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv: tuple[tuple[str, int], ...] = (("q", q_size), ("k", kv_size), ("v", kv_size))
    if "qkv" in BY_NAME[spec.architecture].hf_tensors:
        qkv = (("qkv", q_size + 2 * kv_size),)
    projections = (
        ("qkv", qkv, hidden, spec.qkv_bias),
        ("o", (("o", hidden),), q_size, spec.o_bias),
        ("gate_up", (("gate", inner), ("up", inner)), hidden, spec.mlp_bias),
        ("down", (("down", hidden),), inner, spec.mlp_bias),
    )
    vectors = [("input_norm", hidden), ("post_norm", hidden)]
    if spec.qk_norm:
        vectors += [("q_norm", spec.head_dim), ("k_norm", spec.head_dim)]
    yield Slot("embed", 0, (Part("embed", False, spec.vocab_size),), hidden)
    for layer in range(spec.num_layers):
        for name, roles, columns, has_bias in projections:
            yield Slot(f"layers.{layer}.{name}", layer, tuple(Part(r, False, n) for r, n in roles), columns)
            if has_bias:
                yield Slot(
                    f"layers.{layer}.{name}_bias", layer, tuple(Part(r, True, n) for r, n in roles), None
                )
        for name, length in vectors:
            yield Slot(f"layers.{layer}.{name}", layer, (Part(name, False, length),), None)
    yield Slot("norm", 0, (Part("norm", False, hidden),), None)
    if not spec.tie_embeddings:
        yield Slot("lm_head", 0, (Part("lm_head", False, spec.vocab_size),), hidden)


def _check_names(checkpoint: Checkpoint, spec: ModelSpec, slots: list[Slot]) -> None:
    """Before anything is allocated: every tensor is there, has its shape, and none is left over."""
    stored = checkpoint.shapes()
    expected: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        for part in slot.parts:
            expected[checkpoint.name(part, slot.layer)] = slot.shape_of(part)
    missing = [name for name in expected if name not in stored]
    if missing == [head := checkpoint.name(Part("lm_head", False, 0), 0)]:
        raise ModelFileError(
            checkpoint.path,
            f"tensor {head} is missing, and the configuration does not tie the output to the embeddings "
            "(tie_word_embeddings is false)",
        )
    if missing:
        raise ModelFileError(checkpoint.path, f"{_listed(missing)} missing")
    for name, shape in expected.items():
        if stored[name] != shape:
            raise ModelFileError(
                checkpoint.file_of(name),
                f"tensor {name} has shape {list(stored[name])}, but the configuration asks for {list(shape)}",
            )
    unused = {name for name in stored if name not in expected and not checkpoint.may_be_unused(name)}
    if spec.tie_embeddings:
        # Some checkpoints store the tied matrix a second time.
        unused.discard(head)
    if unused:
        raise ModelFileError(
            checkpoint.path,
            f"{_listed(sorted(unused))} there, but not used by {spec.architecture} models as configured",
        )


def _listed(names: list[str]) -> str:
    """ "tensor a is" or "tensors a, b, c and 5 more are"."""
    shown = ", ".join(shorten(name)[1:-1] for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown}{more} are"


def _allocate(
    model: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise ModelFileError(model, f"no memory for {name} {list(shape)} ({size:.1f} GiB)") from None


class FolderCheckpoint:
    """The safetensors files of a Hugging Face folder."""

    # Older checkpoints carry the rotary frequencies, which follow from the configuration.
    _IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")

    def __init__(self, folder: Path, architecture: str) -> None:
        self.path = folder
        self._files = open_folder(folder)
        self._names, self._wrapper = _as_stored(BY_NAME[architecture].hf_tensors, self._files)
        outside = [name for name in self._files if self._is_outside(name)]
        if outside:
            warn_once(
                f"{folder}: {_listed(outside)} outside of {self._wrapper}* and not used: the language model "
                "alone is served"
            )

    def name(self, part: Part, layer: int) -> str:
        return self._names[part.role].format(i=layer) + (".bias" if part.bias else ".weight")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.tensors[name].shape for name, file in self._files.items()}

    def may_be_unused(self, name: str) -> bool:
        return self._is_outside(name) or self._IGNORED.fullmatch(name) is not None

    def has_own_head(self) -> bool:
        """Whether there is a head that differs from the embeddings, as a fine-tune may have untied them."""
        head, embed = (self.name(Part(role, False, 0), 0) for role in ("lm_head", "embed"))
        if head not in self._files or embed not in self._files:
            return False
        matrices = self._stored(head), self._stored(embed)
        if matrices[0].dtype != matrices[1].dtype:
            matrices = matrices[0].float(), matrices[1].float()
        same = torch.equal(*matrices)
        self._files[head].forget(head)
        self._files[embed].forget(embed)
        return not same

    def file_of(self, name: str) -> Path:
        return self._files[name].path

    def copy(self, name: str, part: Part, out: torch.Tensor) -> None:
        out.copy_(self._stored(name).view(out.shape))
        self._files[name].forget(name)

    def _stored(self, name: str) -> torch.Tensor:
        """A view of the file."""
        file = self._files[name]
        tensor = file.tensors[name]
        dtype, count = TORCH_DTYPES[tensor.dtype], math.prod(tensor.shape)
        return torch.frombuffer(file.map, dtype=dtype, count=count, offset=tensor.start)

    def _is_outside(self, name: str) -> bool:
        """Whether a tensor belongs to another part of the model that the language model was wrapped in."""
        head = self.name(Part("lm_head", False, 0), 0)
        return self._wrapper is not None and not name.startswith(self._wrapper) and name != head


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

    def __init__(self, path: Path, head_dim: int) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._head_dim = head_dim
        self._family = BY_GGUF_NAME[self._file.architecture]

    def name(self, part: Part, layer: int) -> str:
        return self._family.gguf_tensors[part.role].format(i=layer) + (".bias" if part.bias else ".weight")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._file.tensors.items()}

    def may_be_unused(self, name: str) -> bool:
        return name in self._IGNORED

    def has_own_head(self) -> bool:
        return False  # such a file is a tied model only if it has no head

    def file_of(self, name: str) -> Path:
        return self._file.file_of(name)

    def is_quantized(self, slot: Slot) -> bool:
        names = (self.name(part, slot.layer) for part in slot.parts)
        return slot.columns is not None and all(self._file.tensors[name].is_quantized for name in names)

    def quantized_rows(self, name: str) -> QuantizedRows:
        tensor = self._file.tensors[name]
        return QuantizedRows(tensor.type_id, tensor.shape[0], tensor.num_bytes // tensor.shape[0])

    def copy_quantized(self, name: str, part: Part, out: torch.Tensor) -> None:
        raw = self._file.raw_rows(name)
        if self._is_turned(part):
            # Blocks do not cross rows, so that rows can change places as they are; see `copy`.
            raw = raw.reshape(-1, self._head_dim // 2, 2, raw.shape[1]).swapaxes(1, 2)
        np.copyto(out.numpy().reshape(raw.shape), raw)
        self._file.forget(name)

    def copy(self, name: str, part: Part, out: torch.Tensor) -> None:
        rows = out.shape[0]
        turned = self._is_turned(part)
        columns = out.numel() // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        if turned:
            step = max(1, step // self._head_dim) * self._head_dim
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            values = self._file.rows(name, start, stop)
            # float32 rows are a read-only view of the file, which torch would warn about.
            source = torch.from_numpy(values if values.flags.writeable else values.copy())
            source = source.view(stop - start, columns)
            if turned:
                # Stored row 2 j + t of a head is row j + t D/2: pairs are neighbours there, halves here.
                source = source.view(-1, self._head_dim // 2, 2, columns).transpose(1, 2)
            out[start:stop].copy_(source.reshape(out[start:stop].shape))
        self._file.forget(name)

    def _is_turned(self, part: Part) -> bool:
        return self._family.gguf_interleaved and part.role in ("q", "k")


def _dummy_weights(
    model: Path, slots: list[Slot], dtype: torch.dtype, progress: Progress | None, device: str
) -> dict[str, torch.Tensor]:
    """Small random values, the same on every call; norms are ones.

    Values are dealt from a pool that is drawn once: drawing billions of them would take minutes.
    """
    size = min(DUMMY_POOL, max(math.prod(slot.shape) for slot in slots))
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(size, dtype=torch.float32).normal_(0, DUMMY_STD, generator=generator).to(device, dtype)
    weights, offset = {}, 0
    for done, slot in enumerate(slots, 1):
        tensor = weights[slot.name] = _allocate(model, slot.name, slot.shape, dtype, device)
        if slot.name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            flat, filled = tensor.view(-1), 0
            while filled < flat.numel():
                count = min(flat.numel() - filled, size - offset)
                flat[filled : filled + count] = pool[offset : offset + count]
                filled, offset = filled + count, (offset + count) % size
        if progress is not None:
            progress(done, len(slots))
    return weights
