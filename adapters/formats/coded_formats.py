"""Formats of matrices that stay in codes of 4 or 8 bits on a GPU: `ops.coded.CodedTensor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from microvllm.adapters.files.checkpoints import Checkpoint, FolderCheckpoint, GGUFCheckpoint, stored_name
from microvllm.adapters.files.quantization import Scheme
from microvllm.adapters.formats.dequantize import PACKED_LAYOUTS
from microvllm.adapters.formats.weight_formats import Dense, Dequantized, StoredMatrix, allocate
from microvllm.adapters.tensors import PAIRS, Slot
from microvllm.ops.coded import BLOCK, PLANE, CodedTensor, pack


class Coded(Dequantized):
    """Matrices of GPTQ, AWQ and compressed-tensors' packed format.

    Not those of which a part is plain or quantised otherwise, whose groups a shard or a run of words cuts,
    whose rows are not in whole blocks, or whose parts have different orders of columns, as experts may:
    `Dequantized` is for them.
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
        if slot.is_of_experts:  # whose rows of x are gathered, in the order of none of them
            return False
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
    """Whether its matrices have rows in whole blocks, as they lie in the file."""
    lengths = [length for part in slot.parts for length in part.rows.lengths]
    moved = any(part.transposed or part.role == PAIRS for part in slot.parts)
    return not moved and not any(length % BLOCK for length in lengths)


def fits(scheme: Scheme) -> bool:
    """Whether a run of words has whole groups, or a group whole runs."""
    group, step = scheme.block[1], PLANE * 32 // scheme.bits
    return group == 0 or (group % PLANE == 0 and (step % group == 0 or group % step == 0))


def num_words(columns: int, bits: int, plane: int = PLANE) -> int:
    """Of a row of so many codes."""
    return -(-columns * bits // (plane * 32)) * plane


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

    codes: [rows, columns] uint8; scales: [rows, groups]; values are (codes - zero) * scale, or code * scale +
    offset with offsets: [rows, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    zero: int = 0


def _halves(raw: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    """[rows, blocks, bytes] -> float16 numbers from byte `start` on: [rows, blocks, count]."""
    return raw[:, :, start : start + 2 * count].contiguous().view(torch.float16)


def _fields(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., bytes] -> [..., 8 / bits * bytes]: the lowest bits of all, then the next of all."""
    return torch.cat([raw >> place & (1 << bits) - 1 for place in range(0, 8, bits)], -1)


def _fifth_bits(raw: torch.Tensor, start: int) -> torch.Tensor:
    """The 32 bits from byte `start` on, as 16 or 0: [rows, blocks, 32]."""
    places = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return (raw[:, :, start : start + 4, None] >> places & 1).flatten(2) << 4


def _q8_0(raw: torch.Tensor) -> Blocks:
    return Blocks((raw[:, :, 2:] ^ 0x80).flatten(1), _halves(raw, 0).flatten(1), zero=128)


def _q4_0(raw: torch.Tensor) -> Blocks:
    return Blocks(_fields(raw[:, :, 2:], 4).flatten(1), _halves(raw, 0).flatten(1), zero=8)


def _q4_1(raw: torch.Tensor) -> Blocks:
    codes = _fields(raw[:, :, 4:], 4)
    return Blocks(codes.flatten(1), _halves(raw, 0).flatten(1), _halves(raw, 2).flatten(1))


def _q5_0(raw: torch.Tensor) -> Blocks:
    codes = _fields(raw[:, :, 6:], 4) | _fifth_bits(raw, 2)
    return Blocks(codes.flatten(1), _halves(raw, 0).flatten(1), zero=16)


def _q5_1(raw: torch.Tensor) -> Blocks:
    codes = _fields(raw[:, :, 8:], 4) | _fifth_bits(raw, 4)
    return Blocks(codes.flatten(1), _halves(raw, 0).flatten(1), _halves(raw, 2).flatten(1))


def _scales_and_minima(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K, whose 8 groups share two factors of 6-bit scales and minima: scales and offsets."""
    factors, packed = _halves(raw, 0, 2).float(), raw[:, :, 4:16]
    first, second, third = torch.split(packed, 4, 2)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 2)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 2)
    return (factors[:, :, :1] * scales).flatten(1), (-factors[:, :, 1:] * minima).flatten(1)


def _q4_k(raw: torch.Tensor) -> Blocks:
    codes = _fields(raw[:, :, 16:].reshape(*raw.shape[:2], 4, 32), 4)
    return Blocks(codes.flatten(1), *_scales_and_minima(raw))


def _q5_k(raw: torch.Tensor) -> Blocks:
    low = _fields(raw[:, :, 48:].reshape(*raw.shape[:2], 4, 32), 4).flatten(2)
    return Blocks((low | _fields(raw[:, :, 16:48], 1) << 4).flatten(1), *_scales_and_minima(raw))


def _q6_k(raw: torch.Tensor) -> Blocks:
    """Two halves of 128 codes, whose lower four bits and upper two lie apart; 16 scales."""
    low = _fields(raw[:, :, :128].reshape(*raw.shape[:2], 2, 64), 4)
    high = _fields(raw[:, :, 128:192].reshape(*raw.shape[:2], 2, 32), 2)
    scales = raw[:, :, 192:208].view(torch.int8) * _halves(raw, 208).float()
    return Blocks((low | high << 4).flatten(1), scales.flatten(1), zero=32)


def _q3_k(raw: torch.Tensor) -> Blocks:
    """As Q6_K, of two bits and one; the 16 scales have four bits and two apart, too."""
    low = _fields(raw[:, :, 32:96].reshape(*raw.shape[:2], 2, 32), 2).flatten(2)
    packed = raw[:, :, 96:108]
    scales = (_fields(packed[:, :, :8], 4) | _fields(packed[:, :, 8:], 2) << 4).to(torch.int8) - 32
    codes = low | _fields(raw[:, :, :32], 1) << 2
    return Blocks(codes.flatten(1), (scales * _halves(raw, 108).float()).flatten(1), zero=4)


def _q2_k(raw: torch.Tensor) -> Blocks:
    packed, factors = raw[:, :, :16], _halves(raw, 80, 2).float()
    codes = _fields(raw[:, :, 16:80].reshape(*raw.shape[:2], 2, 32), 2)
    scales, minima = factors[:, :, :1] * (packed & 15), -factors[:, :, 1:] * (packed >> 4)
    return Blocks(codes.flatten(1), scales.flatten(1), minima.flatten(1))


class BlockType(NamedTuple):
    """The bits in which a type's codes are kept here, the columns that share a scale, and how it is read.

    read: [rows, blocks, bytes of a block] uint8.
    """

    bits: int
    group: int
    has_offsets: bool
    read: Callable[[torch.Tensor], Blocks]


TYPES: Mapping[str, BlockType] = {  # by ggml's names
    "Q8_0": BlockType(8, 32, False, _q8_0),
    "Q4_0": BlockType(4, 32, False, _q4_0),
    "Q4_1": BlockType(4, 32, True, _q4_1),
    "Q5_0": BlockType(8, 32, False, _q5_0),
    "Q5_1": BlockType(8, 32, True, _q5_1),
    "Q2_K": BlockType(4, 16, True, _q2_k),
    "Q3_K": BlockType(4, 16, False, _q3_k),
    "Q4_K": BlockType(4, 32, True, _q4_k),
    "Q5_K": BlockType(8, 32, True, _q5_k),
    "Q6_K": BlockType(8, 16, False, _q6_k),
}


class CodedBlocks(Dense):
    """Matrices of a GGUF file in some of `TYPES`, exactly.

    Parts of different types, as a Q4_K_M file has them, get the bits and the groups that hold each of them.
    """

    kind: type[torch.Tensor] = CodedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        if not isinstance(checkpoint, GGUFCheckpoint) or slot.name in ("embed", "inputs_embed"):
            return False
        if slot.columns is None or not has_blocks(slot) or not checkpoint.is_quantized(slot):
            return False
        types = [checkpoint.type_of(slot, part) for part in slot.parts]
        if any(name not in TYPES for name, _, _ in types):
            return False
        size = max(length for _, length, _ in types)
        return not any(place % size for run in slot.columns.runs for place in run)

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, GGUFCheckpoint):
            return super().load(checkpoint, slot, dtype, device, loaded)
        types = [checkpoint.type_of(slot, part) for part in slot.parts]
        kinds = [TYPES[name] for name, _, _ in types]
        bits, group = max(kind.bits for kind in kinds), min(kind.group for kind in kinds)
        has_offsets, plane = any(kind.has_offsets for kind in kinds), min(group, PLANE)
        rows, columns = slot.shape
        count = num_words(columns, bits, plane)
        words = allocate(checkpoint.path, slot.name, (rows, count), torch.int32, device)
        scales, offsets, pieces = [], [], torch.split(words, [part.rows.size for part in slot.parts])
        for part, piece, (_, _, block), kind in zip(slot.parts, pieces, types, kinds, strict=True):
            name = stored_name(checkpoint, part, slot.layer)
            size = checkpoint.quantized_rows(name, part, slot.columns).row_bytes
            raw = allocate(checkpoint.path, slot.name, (part.rows.size, size), torch.uint8, "cpu")
            checkpoint.copy_quantized(name, part, slot.columns, raw.view(-1))
            blocks = kind.read(raw.to(device).view(part.rows.size, -1, block))
            codes = blocks.codes if has_offsets else blocks.codes + ((1 << bits - 1) - blocks.zero)
            piece.copy_(pack(codes, bits, plane))
            scales.append(blocks.scales.repeat_interleave(kind.group // group, 1))
            if has_offsets:
                found = -blocks.zero * blocks.scales if blocks.offsets is None else blocks.offsets
                offsets.append(found.repeat_interleave(kind.group // group, 1))
            loaded()
        return CodedTensor.of(
            words,
            bits,
            columns,
            group,
            torch.cat(scales).T.contiguous(),
            torch.cat(offsets).T.contiguous() if offsets else None,
            plane=plane,
        )


# Before those of `weight_formats`.
CODED = (Coded(), CodedBlocks())
