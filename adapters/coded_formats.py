"""Formats of matrices that stay in codes of 4 or 8 bits on a GPU: `ops.coded.CodedTensor`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from microvllm.adapters.checkpoints import Checkpoint, FolderCheckpoint, GGUFCheckpoint, stored_name
from microvllm.adapters.dequantize import PACKED_LAYOUTS
from microvllm.adapters.quantization import Scheme
from microvllm.adapters.tensors import Slot
from microvllm.adapters.weight_formats import Dense, Dequantized, StoredMatrix, allocate
from microvllm.ops.coded import BLOCK, PLANE, CodedTensor, pack

BITS_OF_TYPES = {"Q4_0": 4, "Q8_0": 8}  # of ggml: a float16 and PLANE codes
HALF = 2  # bytes of a float16


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


class CodedBlocks(Dense):
    """Matrices of a GGUF file in Q4_0 or Q8_0, exactly."""

    kind: type[torch.Tensor] = CodedTensor

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        if not isinstance(checkpoint, GGUFCheckpoint) or slot.name == "embed":
            return False
        if slot.columns is None or not has_blocks(slot) or not checkpoint.is_quantized(slot):
            return False
        if any(place % PLANE for place in slot.columns.runs[0]):
            return False
        names = {checkpoint.type_name(slot, part) for part in slot.parts}
        return len(names) == 1 and names <= BITS_OF_TYPES.keys()

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        if slot.columns is None or not isinstance(checkpoint, GGUFCheckpoint):
            return super().load(checkpoint, slot, dtype, device, loaded)
        bits = BITS_OF_TYPES[checkpoint.type_name(slot, slot.parts[0])]
        rows, columns = slot.shape
        words = allocate(checkpoint.path, slot.name, (rows, num_words(columns, bits)), torch.int32, device)
        scales = []
        for part, piece in zip(
            slot.parts, torch.split(words, [p.rows.size for p in slot.parts]), strict=True
        ):
            name = stored_name(checkpoint, part, slot.layer)
            size = checkpoint.quantized_rows(name, part, slot.columns).row_bytes
            raw = allocate(checkpoint.path, slot.name, (part.rows.size, size), torch.uint8, "cpu")
            checkpoint.copy_quantized(name, part, slot.columns, raw.view(-1))
            blocks = raw.to(device).view(part.rows.size, columns // PLANE, -1)
            scales.append(blocks[:, :, :HALF].contiguous().view(torch.float16).squeeze(2))
            piece.copy_(pack(_codes(blocks[:, :, HALF:], bits).view(part.rows.size, columns), bits))
            loaded()
        return CodedTensor.of(words, bits, columns, PLANE, torch.cat(scales).T.contiguous())


def _codes(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, blocks, bytes] uint8 -> [rows, blocks, PLANE] uint8, whose zero point is half of their range."""
    if bits == 8:
        return stored ^ 0x80  # int8
    return torch.cat((stored & 15, stored >> 4), 2)


# Before those of `weight_formats`.
CODED = (Coded(), CodedBlocks())
