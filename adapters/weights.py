"""Loads a checkpoint straight into the fused tensors that the decoder uses.

Result names, all of one dtype and contiguous, matrices as [out, in]: `embed` [V, h], `lm_head` [V, h] (absent
if tied, unless another matrix is stored), `norm` [h], and for every layer i under `layers.{i}.` those of
`LayerSpec.slots`. Matrices that stay packed are subclasses of `Tensor` instead, of the same rows: see
`weight_formats`. If the checkpoint has them, `kv_scales` [2] of each layer, float32 on the CPU: see
`adapters.formats.kv_scales`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.checkpoints import (
    Checkpoint,
    FolderCheckpoint,
    GGUFCheckpoint,
    listed,
    scheme_of,
    stored_name,
)
from microvllm.adapters.files.fields import shorten, warn_once
from microvllm.adapters.files.hf_config import COUNT_KEYS, OTHER_COUNT_KEYS
from microvllm.adapters.files.quantization import Quantization
from microvllm.adapters.formats.coded_formats import CODED, fits, has_blocks, round_to_groups
from microvllm.adapters.formats.dequantize import PACKED_LAYOUTS
from microvllm.adapters.formats.kv_scales import load_scales, scale_tensors
from microvllm.adapters.formats.mxfp4 import MXFP4, fits_mxfp4, round_to_mxfp4
from microvllm.adapters.formats.weight_formats import FORMATS, WeightFormat, allocate, round_matrix
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import BY_NAME
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import WHOLE, Cut, Shard, Slot
from microvllm.ops.coded import CodedTensor
from microvllm.ops.mxfp4 import Mxfp4Tensor
from microvllm.ops.scaled import ScaledTensor

Progress = Callable[[int, int], None]

DUMMY_STD = 0.02
DUMMY_POOL = (1 << 24) - 3  # prime to all row lengths in use, so that rows of one matrix differ


def load_weights(
    model: Path,
    spec: ModelSpec,
    load_format: str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    device: str = "cpu",
    *,
    packed: Collection[type[torch.Tensor]] = (),
    shard: Shard = WHOLE,
) -> dict[str, torch.Tensor]:
    """Load all weights as `dtype` on `device`; see the top of this file for names and shapes.

    `load_format` is "auto", "safetensors", "gguf" or "dummy" (random values, no file is read).
    `packed`: the kinds of tensors that matrices may be kept in beside plain ones (`Operators.packed`). Of
    `spec`, the whole model, only the rows and columns of `shard` are loaded.
    `progress(done, total)` is called after every tensor of the checkpoint. Beside the result only the tensor
    being copied is resident. Raises `ModelFileError` for files that are malformed, and for tensors that are
    missing, of another shape than the spec says, or there but unused: a model computed without some of its
    weights would generate nonsense.
    """
    family = BY_NAME[spec.architecture]
    if load_format == "dummy":
        whole, slots = (list(spec.slots(family.hf_tensors, each)) for each in (WHOLE, shard))
        norm = 1.0 - spec.norm_offset
        dense = _dummy_weights(model, whole, slots, dtype, progress, device, norm)
        if spec.quantization is None:
            return dict(dense)
        return dict(_quantized_dummies(spec.quantization, family.hf_tensors, slots, dense, dtype, packed))
    actual = "safetensors" if model.is_dir() else "gguf"
    if load_format not in ("auto", actual):
        raise ModelFileError(model, f"cannot be loaded as {shorten(load_format)}: it is {actual}")
    checkpoint: Checkpoint = (
        FolderCheckpoint(model, family, spec.quantization, spec.num_layers)
        if model.is_dir()
        else GGUFCheckpoint(model, spec)
    )
    if spec.tie_embeddings and spec.pooling is None and checkpoint.has_own_head():
        warn_once(
            f"{model}: lm_head.weight differs from the embeddings, which the configuration ties it to "
            "(tie_word_embeddings): the stored lm_head is used"
        )
        spec = msgspec.structs.replace(spec, tie_embeddings=False)
    if isinstance(checkpoint, FolderCheckpoint):
        checkpoint.check_on_loading(spec.slots(checkpoint.names))
    formats = [each for each in (*MXFP4, *CODED, *FORMATS) if each.kind in (torch.Tensor, *packed)]

    def format_of(slot: Slot) -> WeightFormat:
        return next(each for each in formats if each.accepts(checkpoint, slot))

    expected: dict[str, tuple[int, ...]] = {}
    for slot in spec.slots(checkpoint.names):
        expected |= format_of(slot).stored_shapes(checkpoint, slot)
    scales = scale_tensors(checkpoint, spec.num_layers)
    expected |= scales
    _check_names(checkpoint, spec, expected)
    slots = list(spec.slots(checkpoint.names, shard))
    plain = [slot for slot in slots if format_of(slot).kind is torch.Tensor]
    # Embeddings and vectors are plain in every model.
    widened = slots if len(plain) == len(slots) else [slot for slot in plain if slot.is_of_experts]
    if spec.quantization is not None and widened:
        what = "weights" if widened is slots else "experts"
        method, name = spec.quantization.method, str(dtype).removeprefix("torch.")
        size = sum(math.prod(slot.shape) for slot in widened) * dtype.itemsize
        stored = sum(path.stat().st_size for path in set(map(checkpoint.file_of, checkpoint.shapes())))
        first = f"are rounded to {method}, then" if spec.quantization.on_loading else f"in {method}"
        warn_once(
            f"{model}: {what} {first} become {name} as they are loaded, {size / 1e9:.2f} GB of memory "
            f"({stored / 1e9:.2f} GB of files); activations are not quantised"
        )
    if packed and isinstance(checkpoint, GGUFCheckpoint):
        wide = [
            slot for slot in filter(checkpoint.is_quantized, slots) if format_of(slot).kind is torch.Tensor
        ]
        if names := sorted({checkpoint.type_of(slot, part)[0] for slot in wide for part in slot.parts}):
            name = str(dtype).removeprefix("torch.")
            warn_once(f"{model}: matrices in {', '.join(names)} become {name} as they are loaded")
    count, total = itertools.count(1), sum(len(slot.parts) for slot in slots)

    def loaded() -> None:
        if progress is not None:
            progress(next(count), total)

    def load(slot: Slot) -> torch.Tensor:
        kind = torch.float32 if slot.is_wide else dtype
        return format_of(slot).load(checkpoint, slot, kind, device, loaded)

    weights = {slot.name: load(slot) for slot in slots}
    if scales and isinstance(checkpoint, FolderCheckpoint):
        pairs = enumerate(load_scales(checkpoint, list(scales)))
        weights |= {f"layers.{layer}.kv_scales": pair for layer, pair in pairs}
    return weights


def _check_names(checkpoint: Checkpoint, spec: ModelSpec, expected: dict[str, tuple[int, ...]]) -> None:
    """Before anything is allocated: every tensor is there, has its shape, and none is left over."""
    stored = checkpoint.shapes()
    _check_experts(checkpoint, spec)
    missing = [name for name in expected if name not in stored]
    if missing == [head := f"{checkpoint.names['lm_head']}.weight"]:
        raise ModelFileError(
            checkpoint.path,
            f"tensor {head} is missing, and the configuration does not tie the output to the embeddings "
            "(tie_word_embeddings is false)",
        )
    if missing:
        raise ModelFileError(checkpoint.path, f"{listed(missing)} missing")
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
    if any(layer.mixer.source is not None for layer in spec.layers):
        # And keys and values of layers that read those of others.
        own = spec.with_layers(each.with_mixer(source=None) for each in spec.layers)
        for slot in own.slots(checkpoint.names):
            unused -= {stored_name(checkpoint, part, slot.layer) for part in slot.parts}
    if unused:
        raise ModelFileError(
            checkpoint.path,
            f"{listed(sorted(unused))} there, but not used by {spec.architecture} models as configured",
        )


def _quantized_dummies(
    quantization: Quantization,
    names: Mapping[str, str],
    slots: list[Slot],
    dense: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    packed: Collection[type[torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """What matrices in e4m3, 4 bits and MXFP4 would be with these values; others stay plain."""
    for slot, (name, tensor) in zip(slots, dense, strict=True):
        scheme = slot.columns and scheme_of(quantization, names, slot.parts[0], slot.layer)
        if scheme and scheme.layout == "scaled" and scheme.is_float:
            made = round_matrix(slot, tensor, scheme)
            tensor = made if ScaledTensor in packed else made.dequantized(dtype)
        elif scheme and scheme.layout in PACKED_LAYOUTS and fits(scheme) and has_blocks(slot):
            coded = round_to_groups(tensor, scheme)
            tensor = coded if CodedTensor in packed else coded.dequantized(dtype)
        elif scheme and scheme.layout == "mxfp4" and fits_mxfp4(slot):
            packed_experts = round_to_mxfp4(tensor)
            tensor = packed_experts if Mxfp4Tensor in packed else packed_experts.dequantized(dtype)
        yield name, tensor


def _check_experts(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Another number of experts than configured would give a list of many tensors."""
    name = re.escape(checkpoint.names.get("expert_down", "")).replace(r"\{i\}", r"\d+")
    if r"\{e\}" not in name:
        return
    pattern = re.compile(name.replace(r"\{e\}", r"(\d+)") + r"\..*")
    keys = (*COUNT_KEYS, *OTHER_COUNT_KEYS)
    numbers = [int(match[1]) for match in map(pattern.fullmatch, checkpoint.shapes()) if match]
    for mlp in {layer.mlp for layer in spec.layers}:
        if isinstance(mlp, Experts) and numbers and max(numbers) != mlp.count - 1:
            raise ModelFileError(
                checkpoint.path,
                f"the configuration asks for {mlp.count} experts ({' or '.join(keys)}), but the "
                f"checkpoint has experts 0 to {max(numbers)}",
            )


def _dummy_weights(
    model: Path,
    slots: list[Slot],
    own: list[Slot],
    dtype: torch.dtype,
    progress: Progress | None,
    device: str,
    norm: float,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Small random values, the same on every call; all weights of norms are `norm`, all scales 1.

    Values are dealt from a pool that is drawn once: drawing billions of them would take minutes. The whole
    model's `slots` are dealt, of which the result has what a shard's `own` hold.
    """
    size = min(DUMMY_POOL, max(math.prod(slot.shape) for slot in slots))
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(size, dtype=torch.float32).normal_(0, DUMMY_STD, generator=generator).to(device, dtype)
    offset, shares = 0, {slot.name: slot for slot in own}
    for done, slot in enumerate(slots, 1):
        tensor = allocate(model, slot.name, slot.shape, dtype, device)
        if slot.name.endswith(("norm", "_scale")) and slot.columns is None:
            tensor.fill_(norm if slot.name.endswith("norm") else 1.0)
        else:
            flat, filled = tensor.view(-1), 0
            while filled < flat.numel():
                count = min(flat.numel() - filled, size - offset)
                flat[filled : filled + count] = pool[offset : offset + count]
                filled, offset = filled + count, (offset + count) % size
        if slot.name in shares:
            yield slot.name, _share(tensor, shares[slot.name])
        if progress is not None:
            progress(done, len(slots))


def _share(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The rows and columns of a slot, of a tensor that holds all that are stored."""
    if slot.shape == tuple(tensor.shape):
        return tensor
    rows = Cut.stacked([part.rows for part in slot.parts])
    tensor = torch.cat([tensor[slice(*run)] for run in rows.runs])
    return tensor if slot.columns is None else tensor[:, slice(*slot.columns.runs[0])].contiguous()
