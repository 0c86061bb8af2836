"""Sums and joins over the GPUs of one host by plain stores into each other's memory: one kernel each.

Every rank stores its part into a box of each other rank, then adds up what arrives in its own. Data and the
number of the call travel in one word of 64 bits, which is stored and read as a whole, so that no flag has to
follow the data: the protocol "LL" of NCCL. A word that has not arrived yet still has the number of the call
before the last, which was in the same half of the box.

Parts are added in the order of the ranks in float32, and the result is rounded once: all ranks get the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from microvllm.ops.gpu.launch import follow, launch_options

BLOCK = tl.constexpr(512)  # words of 32 bits that a program adds up
WORD_BYTES = 4


@triton.jit
def _low(word, TYPE: tl.constexpr):
    """float32 of a word of one float32, or of the first of two numbers of 16 bits."""
    if tl.float32 == TYPE:
        value = word.to(tl.float32, bitcast=True)
    else:
        value = word.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _high(word, TYPE: tl.constexpr):
    return (word >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def _word(low, high, TYPE: tl.constexpr):
    if tl.float32 == TYPE:
        word = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = first | (high.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def _send(own, call, boxes, at, inside, ROOM: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Store words into the boxes of all other ranks, each with the number of the call."""
    sent = (own.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            other = tl.multiple_of(tl.load(boxes + rank).to(tl.pointer_type(tl.int64)), 16)
            place = other + ((call & 1) * SIZE + RANK) * ROOM + at
            tl.store(place, sent, inside, cache_modifier=".wt")


@triton.jit
def _look(place, inside, call, ended):
    """The words as they are now, and whether there are some to wait for: the same for the whole program."""
    got = tl.load(place, inside, call.to(tl.int64) << 32, volatile=True)
    waits = ((got >> 32).to(tl.int32) != call) & (tl.load(ended, volatile=True) == 0)
    return got, tl.max(waits.to(tl.int32), 0) > 0


@triton.jit
def _receive(box, rank, call, ended, at, inside, ROOM: tl.constexpr, SIZE: tl.constexpr):
    """Wait for the words of a rank."""
    box = tl.multiple_of(box.to(tl.pointer_type(tl.int64)), 16)
    place = box + ((call & 1) * SIZE + rank) * ROOM + at
    got, waits = _look(place, inside, call, ended)
    while waits:
        got, waits = _look(place, inside, call, ended)
    return got.to(tl.int32)


@triton.jit
def _sum_kernel(
    out, part, residual, box, boxes, calls, ended, n,
    ROOM: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, TYPE: tl.constexpr, ADDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK words of all parts, which it exchanges with the same program of the other ranks.

    out, part, residual: [n] int32, two numbers each if TYPE has 16 bits; residual is read if ADDS. box: the
    address of [2, SIZE, ROOM] int64, in halves that calls use in turns; boxes: [SIZE] int64, of all ranks'.
    calls: [programs] int32, how often each program has run, the same on all ranks; ended: [1] int32, not 0
    once it is no use to wait.
    """
    follow(PDL)
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    call = tl.load(calls + program) + 1
    own = tl.load(part + at, inside, 0)
    _send(own, call, boxes, at, inside, ROOM, RANK, SIZE)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):
        word = own
        if rank != RANK:
            word = _receive(box, rank, call, ended, at, inside, ROOM, SIZE)
        low += _low(word, TYPE)
        if tl.float32 != TYPE:
            high += _high(word, TYPE)
    if ADDS:
        word = tl.load(residual + at, inside, 0)
        low += _low(word, TYPE)
        if tl.float32 != TYPE:
            high += _high(word, TYPE)
    tl.store(out + at, _word(low, high, TYPE), inside)
    # Behind a reduction over the program: all of its threads have read it.
    tl.store(calls + program, call)


@triton.jit
def _join_kernel(
    out, part, box, boxes, calls, ended, n, width,
    ROOM: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK words of all parts. part: [n / width, width]; out: [n / width, SIZE * width], int32.

    The rest as in `_sum_kernel`.
    """
    follow(PDL)
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    call = tl.load(calls + program) + 1
    own = tl.load(part + at, inside, 0)
    _send(own, call, boxes, at, inside, ROOM, RANK, SIZE)
    place = out + at // width * (SIZE * width) + at % width
    for rank in tl.static_range(SIZE):
        word = own
        if rank != RANK:
            word = _receive(box, rank, call, ended, at, inside, ROOM, SIZE)
        tl.store(place + rank * width, word, inside)
    tl.store(calls + program, call)


def box_bytes(size: int, room: int) -> int:
    """How large the box of each of `size` ranks is."""
    return 2 * size * room * 8


class PeerExchange:
    """Sums and joins tensors of up to `room` words of 32 bits over all ranks. `rank` is this process's.

    boxes: the addresses of the ranks' boxes, zero at first, as this device reaches them. All ranks call with
    the same shapes in the same order, on one stream.
    """

    def __init__(
        self, rank: int, boxes: Sequence[int], room: int, device: torch.device, *, pdl: bool = False
    ) -> None:
        self._rank, self._size, self.room = rank, len(boxes), room
        self._box = boxes[rank]
        self._boxes = torch.tensor(boxes, dtype=torch.int64, device=device)
        self._calls = torch.zeros(triton.cdiv(room, BLOCK.value), dtype=torch.int32, device=device)
        self._ended = torch.zeros(1, dtype=torch.int32, device=device)
        self._options = launch_options(pdl)

    def fits(self, part: Tensor) -> bool:
        """Whether a part, [n, d], can be exchanged here: its rows have to be whole words."""
        row_bytes = part.shape[1] * part.element_size()
        return row_bytes % WORD_BYTES == 0 and part.shape[0] * row_bytes <= WORD_BYTES * self.room

    def sum(self, part: Tensor, residual: Tensor | None = None) -> Tensor:
        """part: [n, d], contiguous -> residual + the parts of all ranks, [n, d], where either was."""
        out = part if residual is None else residual
        words, target = _words(part), _words(out)
        _sum_kernel[(triton.cdiv(words.numel(), BLOCK.value),)](
            target, words, target, self._box, self._boxes, self._calls, self._ended, words.numel(),
            ROOM=self.room, RANK=self._rank, SIZE=self._size, TYPE=_TYPES[part.dtype],
            ADDS=residual is not None, num_warps=4, **self._options,
        )  # fmt: skip
        return out

    def join(self, part: Tensor) -> Tensor:
        """part: [m, w], contiguous -> the parts of all ranks beside each other, [m, size * w]."""
        rows, width = part.shape
        out = part.new_empty(rows, self._size * width)
        words = _words(part)
        _join_kernel[(triton.cdiv(words.numel(), BLOCK.value),)](
            _words(out), words, self._box, self._boxes, self._calls, self._ended, words.numel(),
            words.numel() // rows, ROOM=self.room, RANK=self._rank, SIZE=self._size, num_warps=4,
            **self._options,
        )  # fmt: skip
        return out

    def end(self) -> None:
        """Let kernels that wait for another rank end, from any thread; what they give is meaningless."""
        with torch.cuda.stream(torch.cuda.Stream(self._ended.device)):
            self._ended.fill_(1)


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.int32)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
