"""The sum over peer memory: what a rank sends, what it adds up, and that it waits for what it has not got."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter

from microvllm.ops.gpu import peers
from microvllm.ops.gpu.peers import PeerExchange

BLOCK = peers.BLOCK.value
DEVICE = triton_interpreter.DEVICE
ROOM = 4 * BLOCK
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exchange(rank: int, boxes: list[torch.Tensor]) -> PeerExchange:
    return PeerExchange(rank, [box.data_ptr() for box in boxes], ROOM, DEVICE)


def words_of(part: torch.Tensor) -> torch.Tensor:
    return part.reshape(-1).view(torch.int32).long() & 0xFFFFFFFF


def send(box: torch.Tensor, rank: int, call: int, part: torch.Tensor) -> None:
    """What another rank's kernel stores into a box."""
    words = words_of(part)
    box[call & 1, rank, : len(words)] = words | (call << 32)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 1)])
def test_parts_are_added_in_the_order_of_the_ranks(
    size: int, rank: int, dtype: torch.dtype, with_residual: bool
) -> None:
    boxes = [torch.zeros(2, size, ROOM, dtype=torch.int64, device=DEVICE) for _ in range(size)]
    total = exchange(rank, boxes)
    for call, rows in enumerate((3, 1, 5, 3)):
        parts = [torch.randn(rows, 300, device=DEVICE).to(dtype) for _ in range(size)]
        residual = torch.randn(rows, 300, device=DEVICE).to(dtype) if with_residual else None
        want = torch.zeros(rows, 300, device=DEVICE)
        for part in parts:
            want += part.float()
        if residual is not None:
            want += residual.float()
        own = parts[rank].clone()
        # Programs that a call has none of did not run: they count their own calls.
        counted = total._calls.tolist()
        for other in range(size):
            if other != rank:
                message = torch.zeros(ROOM, dtype=torch.int64, device=DEVICE)
                words = words_of(parts[other])
                for program in range(-(-len(words) // BLOCK)):
                    at = slice(program * BLOCK, min((program + 1) * BLOCK, len(words)))
                    message[at] = words[at] | (counted[program] + 1 << 32)
                    half = counted[program] + 1 & 1
                    boxes[rank][half, other, at] = message[at]
        got = total.sum(own, residual)
        # The interpreter cuts float32 off to bfloat16, a GPU rounds it.
        exact = dtype != torch.bfloat16 or DEVICE.type == "cuda"
        assert got.equal(want.to(dtype)) if exact else torch.allclose(got.float(), want, 2**-7, 1e-6), call
        assert got is (own if residual is None else residual)
        for other in range(size):
            if other != rank:
                words = words_of(parts[rank])[:BLOCK]
                sent = boxes[other][counted[0] + 1 & 1, rank, : len(words)]
                assert (sent & 0xFFFFFFFF).equal(words)
                assert bool((sent >> 32 == counted[0] + 1).all())


def test_a_kernel_that_waits_can_be_ended() -> None:
    """Of the other rank only a part has arrived, and what it sent two calls ago."""
    boxes = [torch.zeros(2, 2, ROOM, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    total = exchange(0, boxes)
    part = torch.ones(1, 64, device=DEVICE)
    send(boxes[0], 1, 1, part[:, :32])
    total._ended.fill_(1)
    total.sum(part)
    assert part[:, :32].eq(2).all() and part[:, 32:].eq(1).all()


def test_what_does_not_fit() -> None:
    total = PeerExchange(0, [0, 0], ROOM, DEVICE)
    assert total.fits(torch.zeros(4, ROOM // 4)) and not total.fits(torch.zeros(5, ROOM // 4))
    assert total.fits(torch.zeros(1, 2 * ROOM, dtype=torch.bfloat16))
    assert not total.fits(torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_beside_each_other(dtype: torch.dtype) -> None:
    for rank in (0, 1):
        boxes = [torch.zeros(2, 2, ROOM, dtype=torch.int64, device=DEVICE) for _ in range(2)]
        peers = exchange(rank, boxes)
        for call in (1, 2, 3):
            parts = [torch.randn(3, 250, device=DEVICE).to(dtype) for _ in range(2)]
            send(boxes[rank], 1 - rank, call, parts[1 - rank])
            assert peers.join(parts[rank]).equal(torch.cat(parts, 1))
