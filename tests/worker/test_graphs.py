"""Which graph a step is replayed by, how it is padded, and what is counted.

On a CPU: a graph here computes its step again. That real ones do the same is tested in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICE

from microvllm.ops.attention import AttentionBatch
from microvllm.runtime.worker import graphs
from microvllm.runtime.worker.step_inputs import UNKNOWN, StepArrays

ROWS, BLOCK, WIDTH = 8, 4, 6  # the last row is the padding row


class Recomputed:
    """Stands for a CUDA graph: a replay writes what the step gives now where its first results lie."""

    def __init__(self, step: Callable[[], Any], results: Any) -> None:
        self._step, self._results = step, results

    @torch.inference_mode()
    def replay(self) -> None:
        for old, new in zip(self._results, self._step(), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


class Model:
    """Hidden states that show each token's id, position and slot."""

    def forward(self, ids: Tensor, batch: AttentionBatch) -> Tensor:
        return torch.stack((ids, batch.positions, batch.slots), 1).float()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> tuple[graphs.PromptGraphs, graphs.DecodeGraphs, mock.Mock]:
    def capture(step: Callable[[], Any], pool: object, stream: object) -> tuple[Recomputed, Any]:
        results = step()
        return Recomputed(step, results), results

    for name in ("Stream", "synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "borrowed", lambda tensor: tensor)
    monkeypatch.setattr(graphs, "can_launch_early", lambda device: False)
    monkeypatch.setattr(graphs, "graph_levers", lambda config: mock.Mock(prompt_tokens=lambda products: 64))

    def send_into(out: Tensor, values: np.ndarray) -> None:
        out.copy_(torch.from_numpy(values))

    inputs = mock.Mock(newest=torch.arange(100, 100 + ROWS, device=DEVICE))
    inputs.stager.send_into = send_into
    inputs.stager.send = lambda *arrays: [torch.from_numpy(each.astype(np.int32)) for each in arrays]
    sampler = mock.Mock()
    sampler.choose_plain = lambda logits, rows, lens, delivery: logits[:, 0].long() + rows
    config = SimpleNamespace(
        max_num_seqs=ROWS - 1,
        max_num_batched_tokens=64,
        num_groups=1,
        block_size=BLOCK,
        max_blocks=WIDTH,
        spec=SimpleNamespace(num_products=0),
    )
    attention = mock.Mock(begin_step=lambda batch: batch)
    parts: Any = SimpleNamespace(
        config=config,
        model=Model(),
        attention=attention,
        inputs=inputs,
        sampler=sampler,
        readback=mock.Mock(start=0),
    )
    prompts, decodes = graphs.make_graphs(parts)
    stage = mock.Mock()
    for each in (prompts, decodes):
        each.capture(stage, 100)
    assert stage.advance.call_count == len(prompts.sizes) + len(decodes.sizes)
    return prompts, decodes, sampler


def decode(row: int, start: int, token: int, block: int | None = None) -> Any:
    """An entry of one token of a request, perhaps the first of a new block; `UNKNOWN` is in flight."""
    known = [token] * (start + (token != UNKNOWN))
    request = SimpleNamespace(row=row, token_ids=known)
    blocks = () if block is None else (block,)
    return SimpleNamespace(request=request, start=start, first_block=start // BLOCK, new_blocks=blocks)


def test_the_largest_sizes_are_captured_first(captured: Any) -> None:
    prompts, decodes, sampler = captured
    assert list(decodes._captured) == [7, 4, 2, 1] == decodes.sizes[::-1]
    rooms = [size.decodes + size.tokens for size in prompts._captured]
    assert rooms == sorted(rooms, reverse=True) and set(prompts._captured) == set(prompts.sizes)
    assert sampler.rules.capture.call_count == 4

    few, stage = graphs.DecodeGraphs(decodes._parts, None), mock.Mock()
    few.capture(stage, 2)
    assert list(few._captured) == [7, 4] and stage.advance.call_count == 2


def test_a_decode_step_is_replayed_by_the_smallest_graph_that_holds_it(captured: Any) -> None:
    _, decodes, _ = captured
    items = [decode(5, 4, 31, block=3), decode(0, 0, UNKNOWN, block=9), decode(2, 8, 33, block=1)]
    size = decodes.send(items)
    ids, logits, tokens = decodes.replay(size, len(items))
    assert size == 4 and ids.tolist() == [31, 100, 33]
    assert logits.tolist() == [[31, 4, 3 * BLOCK], [100, 0, 9 * BLOCK], [33, 8, BLOCK]]
    assert tokens.tolist() == [36, 100, 35]
    assert decodes.tables[0, 5, 1] == 3 and decodes.tables[0, 2, 2] == 1
    assert (decodes.replays, decodes.padded_tokens) == (1, 1)

    decodes.replay(decodes.send(items[:1]), 1)
    assert (decodes.replays, decodes.padded_tokens) == (2, 1)


def test_a_step_with_prompts_comes_back_without_its_padding(captured: Any) -> None:
    prompts, _, _ = captured
    arrays = StepArrays(
        ids=np.array([UNKNOWN, 8, 9, 10]),
        rows=np.array([3, 1, 1, 1]),
        positions=np.array([6, 0, 1, 2]),
        slots=np.array([[20, 4, 5, 6]]),
        request_rows=np.array([3, 1]),
        lengths=np.array([1, 3]),
        context=np.array([7, 3]),
        num_decodes=1,
    )
    size = prompts.size_for(arrays)
    prompts.send(size, arrays)
    ids, hidden = prompts.forward(size, arrays)
    assert ids.tolist() == [103, 8, 9, 10]
    assert hidden.tolist() == [[103, 6, 20], [8, 0, 4], [9, 1, 5], [10, 2, 6]]
    assert (prompts.replays, prompts.padded_tokens) == (1, size.decodes + size.tokens - 4)
