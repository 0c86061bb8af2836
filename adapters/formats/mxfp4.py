"""Experts in MXFP4, as gpt-oss's folders store them: packed, or the values that they stand for.

Beside a name such as `experts.gate_up_proj` are `_blocks` [E, rows, columns / 32, 16] and `_scales` [E, rows,
columns / 32], both uint8; see `ops.mxfp4`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.checkpoints import Checkpoint, FolderCheckpoint, stored_name
from microvllm.adapters.files.quantization import KEY
from microvllm.adapters.formats.coded_formats import num_words
from microvllm.adapters.formats.dequantize import CHUNK_ELEMENTS
from microvllm.adapters.formats.weight_formats import Dense, allocate
from microvllm.adapters.tensors import PAIRS, Part, Slot
from microvllm.ops.coded import BLOCK as ROW_BLOCK
from microvllm.ops.coded import PLANE
from microvllm.ops.mxfp4 import (
    BIAS,
    BLOCK,
    LARGEST,
    MAX_SCALE,
    NAN_SCALE,
    PLACES,
    Mxfp4Tensor,
    quantize,
    scales_of,
    values,
    words_of,
)
from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

GGML_TYPE = 39  # ggml's number of it


class Mxfp4(Dense):
    """Values of one dtype."""

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        if not isinstance(checkpoint, FolderCheckpoint) or slot.columns is None:
            return False
        scheme = checkpoint.scheme(slot.parts[0], slot.layer)
        return scheme is not None and scheme.layout == "mxfp4"

    def stored_shapes(self, checkpoint: Checkpoint, slot: Slot) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        columns = slot.columns.stored if slot.columns else 0
        for part in slot.parts:
            plain = stored_name(checkpoint, part, slot.layer)
            if plain in found:
                continue
            if not part.stacked:
                raise ModelFileError(
                    checkpoint.path, f"{plain}: experts in MXFP4 are one tensor, as in gpt-oss, not one each"
                )
            if columns % BLOCK:
                raise ModelFileError(
                    checkpoint.path, f"{plain}: rows of {columns} weights are not whole blocks of {BLOCK}"
                )
            if isinstance(checkpoint, FolderCheckpoint) and checkpoint.find(plain):
                raise ModelFileError(
                    checkpoint.file_of(plain),
                    f"tensor {plain} is there, although {KEY} quantises this module",
                )
            shape = part.stacked, part.rows.stored // part.stacked, columns // BLOCK
            found |= {f"{plain}_blocks": (*shape, BLOCK // 2), f"{plain}_scales": shape}
        for name in found:
            _check_bytes(checkpoint, name)
        return found

    def _copy(self, checkpoint: Checkpoint, slot: Slot, part: Part, out: torch.Tensor) -> None:
        if slot.columns is None or not isinstance(checkpoint, FolderCheckpoint):
            return
        start, stop = slot.columns.runs[0]
        first, last = start // BLOCK, -(-stop // BLOCK)
        filled = 0
        for codes, scales in stored_rows(checkpoint, slot, part, range(first, last), out.dtype):
            device = out.device
            found = values(codes.to(device), scales.to(device), out.dtype)
            found = found[:, start - first * BLOCK : stop - first * BLOCK]
            out[filled : filled + len(found)].copy_(found)
            filled += len(found)


class Mxfp4Packed(Mxfp4):
    """The codes and scales themselves, for the products of a GPU.

    Not where rows are no whole blocks of 16 or a shard cuts through a scale's columns.
    """

    kind: type[torch.Tensor] = Mxfp4Tensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        return super().accepts(checkpoint, slot) and fits_mxfp4(slot)

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, FolderCheckpoint):
            return super().load(checkpoint, slot, dtype, device, loaded)
        (start, stop), (rows, columns) = slot.columns.runs[0], slot.shape
        words = allocate(checkpoint.path, slot.name, (rows, num_words(columns, 4)), torch.int32, device)
        count = num_words(columns, 4) // PLANE * PLACES
        scales = allocate(checkpoint.path, slot.name, (rows, count), torch.uint8, device)
        filled = 0
        for part in slot.parts:
            blocks = range(start // BLOCK, stop // BLOCK)
            for codes, found in stored_rows(checkpoint, slot, part, blocks, dtype):
                run = slice(filled, filled + len(codes))
                words[run].copy_(words_of(codes.to(device)))
                scales[run].copy_(scales_of(found))
                filled = run.stop
            loaded()
        made = Mxfp4Tensor.of(words, columns, scales)
        # No weights of a model are that large; what they are worth is right all the same.
        return made.dequantized(dtype) if int(scales.max()) > MAX_SCALE else made


class Mxfp4Blocks(Mxfp4):
    """ggml's blocks of the same numbers, for the kernels of a CPU.

    Not where a shard cuts through a block's columns.
    """

    kind: type[torch.Tensor] = QuantizedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        columns = slot.columns.runs[0] if slot.columns else (1,)
        return super().accepts(checkpoint, slot) and not any(place % BLOCK for place in columns)

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, FolderCheckpoint):
            return super().load(checkpoint, slot, dtype, device, loaded)
        start, stop = slot.columns.runs[0]
        blocks = range(start // BLOCK, stop // BLOCK)
        shape = slot.shape[0], len(blocks), 1 + BLOCK // 2
        out, parts = allocate(checkpoint.path, slot.name, shape, torch.uint8, "cpu"), []
        filled = 0
        for part in slot.parts:
            for codes, scales in stored_rows(checkpoint, slot, part, blocks, torch.float32):
                rows = out[filled : filled + len(codes)]
                filled += len(codes)
                pairs = codes.view(*rows.shape[:2], BLOCK // 2)
                # There neighbours are in a byte, and here the first half of the block and the second.
                numbers = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
                rows[:, :, 0] = scales
                rows[:, :, 1:] = numbers[:, :, : BLOCK // 2] | numbers[:, :, BLOCK // 2 :] << 4
            count = 2 if part.role == PAIRS else 1  # gate and up
            parts += [QuantizedRows(GGML_TYPE, part.rows.size // count, out[0].numel())] * count
            loaded()
        return QuantizedTensor.of(out.view(-1), slot.columns.size, tuple(parts))


def fits_mxfp4(slot: Slot) -> bool:
    """Whether the rows and columns of a slot's experts are whole blocks of an `Mxfp4Tensor`."""
    step = 2 * ROW_BLOCK if slot.parts[0].role == PAIRS else ROW_BLOCK
    places = [place for part in slot.parts for run in part.own_rows.runs for place in run]
    columns = slot.columns.runs[0] if slot.columns else (1,)
    return not any(place % step for place in places) and not any(place % BLOCK for place in columns)


def round_to_mxfp4(weight: torch.Tensor) -> Mxfp4Tensor:
    """[rows, columns] of experts that fit."""
    made = [quantize(some) for some in torch.split(weight, 1 << 14)]
    words = torch.cat([words_of(codes) for codes, _ in made])
    return Mxfp4Tensor.of(words, weight.shape[1], torch.cat([scales_of(found) for _, found in made]))


def stored_rows(
    checkpoint: FolderCheckpoint, slot: Slot, part: Part, blocks: range, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The codes and scales of the part's rows, some at a time, in these blocks of columns.

    Rows of gate and up come apart. Raises `ModelFileError` for a scale that gives no number of `dtype`.
    """
    name = stored_name(checkpoint, part, slot.layer)
    codes, scales = (checkpoint.view(f"{name}_{kind}")[part.expert or 0] for kind in ("blocks", "scales"))
    step = max(1, CHUNK_ELEMENTS["cpu"] // (len(blocks) * BLOCK) // ROW_BLOCK) * ROW_BLOCK
    for run in part.own_rows.runs:
        for rows in _in_order(range(*run), part.role == PAIRS, step):
            places = slice(rows.start, rows.stop, rows.step), slice(blocks.start, blocks.stop)
            found = scales[places]
            largest = int(found.max()) if found.numel() else 0
            if largest == NAN_SCALE or LARGEST * 2.0 ** (largest - BIAS) > torch.finfo(dtype).max:
                problem = "that is no number" if largest == NAN_SCALE else f"of 2 ** {largest - BIAS}"
                full = f"{name}_scales"
                raise ModelFileError(
                    checkpoint.file_of(full),
                    f"tensor {full} has a scale {problem}"
                    + (
                        "" if largest == NAN_SCALE else f", too large for {str(dtype).removeprefix('torch.')}"
                    ),
                )
            yield codes[places].flatten(1), found
    for kind in ("blocks", "scales"):
        checkpoint.forget(f"{name}_{kind}")


def _in_order(rows: range, has_pairs: bool, step: int) -> Iterator[range]:
    """Runs of at most `step` rows; of pairs all of gate, then all of up."""
    for whole in (rows[::2], rows[1::2]) if has_pairs else (rows,):
        for start in range(0, len(whole), step):
            yield whole[start : start + step]


def _check_bytes(checkpoint: Checkpoint, name: str) -> None:
    tensor = checkpoint.find(name) if isinstance(checkpoint, FolderCheckpoint) else None
    if tensor is not None and tensor.dtype != "U8":
        raise ModelFileError(
            checkpoint.file_of(name), f"tensor {name} is stored as {tensor.dtype}, but {KEY} asks for U8"
        )


# Before all others.
MXFP4 = (Mxfp4Packed(), Mxfp4Blocks(), Mxfp4())
