"""Formats of matrices that stay in codes of 4 or 8 bits on a GPU: `ops.coded.CodedTensor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from microvllm.adapters.checkpoints import Checkpoint, FolderCheckpoint, GGUFCheckpoint, stored_name
from microvllm.adapters.dequantize import PACKED_LAYOUTS
from microvllm.adapters.quantization import Scheme
from microvllm.adapters.tensors import Slot
from microvllm.adapters.weight_formats import Dense, Dequantized, StoredMatrix, allocate
from microvllm.ops.coded import BLOCK, PLANE, CodedTensor, pack


class Coded(Dequantized):
    """Matrices of GPTQ, AWQ and compressed-tensors' packed format.

    Not those of which a part is plain or quantised otherwise, whose groups a shard or a run of words cuts,
    whose rows are not in whole blocks, or whose parts have different orders of columns: `Dequantized` is for
    them.
    """

    kind: type[torch.Tensor] = CodedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        matrices = self._matrices(checkpoint, slot)
        if not matrices or slot.columns is None or not has_blocks(slot):
            return False
        scheme, (start, stop) = matrices[0].scheme, slot.columns.runs[0]
        if any(matrix.scheme != scheme for matrix in matrices) or not fits(scheme):
            return False
        if scheme.block[1] and start % scheme.block[1]:
            return False
        if not scheme.ordered:
            return True
        first, *others = (matrix.order() for matrix in matrices)
        if first is None or stop - start != slot.columns.stored:
            return False
        return all(other is not None and other.equal(first) for other in others)

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        matrices = self._matrices(checkpoint, slot)
        scheme, columns = matrices[0].scheme, slot.shape[1]
        order = matrices[0].order() if scheme.ordered else None
        words = allocate(
            checkpoint.path, slot.name, (slot.shape[0], num_words(columns, scheme.bits)), torch.int32, device
        )
        scales, zeros = [], []
        pieces = torch.split(words, [part.rows.size for part in slot.parts])
        for matrix, piece in zip(matrices, pieces, strict=True):
            found, points = matrix.copy_words(piece, order)
            scales.append(found)
            zeros.append(points)
            loaded()
        return CodedTensor.of(
            words,
            scheme.bits,
            columns,
            scheme.block[1] or columns,
            torch.cat(scales).T.contiguous(),
            torch.cat([each for each in zeros if each is not None]).T.contiguous()
            if zeros[0] is not None
            else None,
            None if order is None else order.to(device),
        )

    def _matrices(self, checkpoint: Checkpoint, slot: Slot) -> list[StoredMatrix]:
        """The stored matrices of all parts; none if one is plain or has another layout."""
        if not isinstance(checkpoint, FolderCheckpoint) or slot.columns is None:
            return []
        found = []
        for part in slot.parts:
            scheme = checkpoint.scheme(part, slot.layer)
            if scheme is None or scheme.layout not in PACKED_LAYOUTS:
                return []
            found.append(StoredMatrix(checkpoint, slot, part, scheme))
        return found


def has_blocks(slot: Slot) -> bool:
    """Whether it is one matrix whose rows, in whole blocks, are multiplied together."""
    lengths = [length for part in slot.parts for length in part.rows.lengths]
    return not slot.is_of_experts and not any(length % BLOCK for length in lengths)


def fits(scheme: Scheme) -> bool:
    """Whether a run of words has whole groups, or a group whole runs."""
    group, step = scheme.block[1], PLANE * 32 // scheme.bits
    return group == 0 or (group % PLANE == 0 and (step % group == 0 or group % step == 0))


def num_words(columns: int, bits: int) -> int:
    """Of a row of so many codes."""
    return -(-columns * bits // (PLANE * 32)) * PLANE


def round_to_groups(weight: torch.Tensor, scheme: Scheme) -> CodedTensor:
    """[rows, columns] in the codes of a scheme: the largest of each group becomes the largest code."""
    rows, columns = weight.shape
    group = scheme.block[1] or columns
    middle = 1 << scheme.bits - 1
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group).float()
    scales = (padded.abs().amax(2) / (middle - 1)).clamp(min=1e-7).half()
    codes = (padded / scales.float().unsqueeze(2)).round().clamp(-middle, middle - 1) + middle
    words = pack(codes.to(torch.uint8).view(rows, -1)[:, :columns], scheme.bits)
    zeros = None if scheme.symmetric else torch.full_like(scales.T.contiguous(), middle).to(torch.uint8)
    return CodedTensor.of(words, scheme.bits, columns, group, scales.T.contiguous(), zeros)


class Blocks(NamedTuple):
    """The codes of rows in one of ggml's types.

    codes: [rows, columns] uint8; scales: [rows, groups of PLANE]; offsets: the same, where values are code *
    scale + offset, or None where the zero point is half of the codes' range.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


def _halves(raw: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    """[rows, blocks, bytes] -> float16 numbers from byte `start` on: [rows, blocks, count]."""
    return raw[:, :, start : start + 2 * count].contiguous().view(torch.float16)


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """[..., bytes] -> [..., 2 * bytes]: all lower halves, then all upper ones."""
    return torch.cat((raw & 15, raw >> 4), -1)


def _q8_0(raw: torch.Tensor) -> Blocks:
    return Blocks((raw[:, :, 2:] ^ 0x80).flatten(1), _halves(raw, 0).flatten(1))


def _q4_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 2:]).flatten(1), _halves(raw, 0).flatten(1))


def _q4_1(raw: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(raw[:, :, 4:]).flatten(1), _halves(raw, 0).flatten(1), _halves(raw, 2).flatten(1))


def _q4_k(raw: torch.Tensor) -> Blocks:
    """Eight groups of PLANE columns, whose 6-bit scales and minima share two factors."""
    factors, packed = _halves(raw, 0, 2).float(), raw[:, :, 4:16]
    first, second, third = torch.split(packed, 4, 2)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 2)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 2)
    codes = _nibbles(raw[:, :, 16:].reshape(*raw.shape[:2], 4, PLANE))
    return Blocks(
        codes.flatten(1), (factors[:, :, :1] * scales).flatten(1), (-factors[:, :, 1:] * minima).flatten(1)
    )


# By ggml's names: the bytes of a block, the bits of a code, and how they are read.
TYPES: Mapping[str, tuple[int, int, Callable[[torch.Tensor], Blocks]]] = {
    "Q8_0": (34, 8, _q8_0),
    "Q4_0": (18, 4, _q4_0),
    "Q4_1": (20, 4, _q4_1),
    "Q4_K": (144, 4, _q4_k),
}


class CodedBlocks(Dense):
    """Matrices of a GGUF file in one of `TYPES`, exactly."""

    kind: type[torch.Tensor] = CodedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        if not isinstance(checkpoint, GGUFCheckpoint) or slot.name == "embed":
            return False
        if slot.columns is None or not has_blocks(slot) or not checkpoint.is_quantized(slot):
            return False
        names = {checkpoint.type_name(slot, part) for part in slot.parts}
        if len(names) > 1 or not names <= TYPES.keys():
            return False
        size = 256 if names == {"Q4_K"} else PLANE
        return not any(place % size for place in slot.columns.runs[0])

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, GGUFCheckpoint):
            return super().load(checkpoint, slot, dtype, device, loaded)
        block, bits, read = TYPES[checkpoint.type_name(slot, slot.parts[0])]
        rows, columns = slot.shape
        words = allocate(checkpoint.path, slot.name, (rows, num_words(columns, bits)), torch.int32, device)
        found, pieces = [], torch.split(words, [part.rows.size for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            name = stored_name(checkpoint, part, slot.layer)
            size = checkpoint.quantized_rows(name, part, slot.columns).row_bytes
            raw = allocate(checkpoint.path, slot.name, (part.rows.size, size), torch.uint8, "cpu")
            checkpoint.copy_quantized(name, part, slot.columns, raw.view(-1))
            blocks = read(raw.to(device).view(part.rows.size, -1, block))
            piece.copy_(pack(blocks.codes, bits))
            found.append(blocks)
            loaded()
        scales = torch.cat([each.scales for each in found]).T.contiguous()
        offsets = [each.offsets for each in found if each.offsets is not None]
        return CodedTensor.of(
            words, bits, columns, PLANE, scales, torch.cat(offsets).T.contiguous() if offsets else None
        )


# Before those of `weight_formats`.
CODED = (Coded(), CodedBlocks())
