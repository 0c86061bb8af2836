"""A step's tensors on the CPU: those kept from the last step are what would be made anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tools import make_request

from microvllm.ops.attention import AttentionBatch
from microvllm.runtime.core.kv_cache import BlockPool, KVCacheManager, LayerGroup
from microvllm.runtime.core.plan import NO_TOKEN, Request, ScheduledRequest
from microvllm.runtime.worker.step_inputs import HostInputs, StepArrays

POOLS, ROWS, BLOCK, WIDTH = 2, 4, 3, 40


def new_request(row: int, prompt: int) -> Request:
    tokens = list(range(100 * row, 100 * row + prompt))
    keys = KVCacheManager([LayerGroup(BlockPool(1, BLOCK))], enable_prefix_caching=False).prefix_keys(tokens)
    request = Request(make_request(row, tokens, 1000), (0, row), keys, tokens)
    request.row = row
    return request


def values(made: tuple[torch.Tensor, AttentionBatch]) -> list[Any]:
    ids, batch = made
    table = batch.segment_table
    parts = [ids, batch.positions, batch.slots, batch.decode_blocks, batch.decode_lens]
    parts += [] if table is None else [table.starts, table.context_lens, table.blocks]
    others = [values((ids, other)) for other in batch.others]
    return [batch.num_decodes, *(part.tolist() for part in parts), *others]


@settings(max_examples=80)
@given(st.booleans(), st.data())
def test_inputs_that_stay_are_those_made_anew(in_flight: bool, data: st.DataObject) -> None:
    """Requests come, go, pause, and compute one or more tokens; `in_flight`: each is known a step late."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tables = np.zeros((POOLS, ROWS, WIDTH), dtype=np.int64)
    inputs, running, newest = HostInputs(ROWS, BLOCK), dict[int, Request](), [0] * ROWS
    pending: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 20))):
        for row in range(ROWS):
            if data.draw(st.integers(0, 9)) == 0:
                inputs.clear_row(row)
                newest[row] = 0
                pending.pop(row, None)
                running[row] = new_request(row, data.draw(st.integers(1, 7)))
                tables[:, row] = random.permutation(1000)[: POOLS * WIDTH].reshape(POOLS, WIDTH)
        items = []
        for row, request in running.items():
            missing = len(request.token_ids) + (row in pending) - request.num_computed
            if missing and data.draw(st.integers(0, 9)):
                num_new = data.draw(st.integers(1, missing))
                samples = num_new == missing
                items.append(ScheduledRequest(request, request.num_computed, num_new, samples, 0, ()))
                request.num_computed += num_new
        items.sort(key=lambda item: item.num_new > 1)
        if items:
            made = inputs.advance(items)
            if made is None:
                made = inputs.make(StepArrays.of(items, tables, BLOCK), tables)
            fresh = HostInputs(ROWS, BLOCK)
            fresh.set_newest(range(ROWS), torch.tensor(newest))
            assert values(made) == values(fresh.make(StepArrays.of(items, tables, BLOCK), tables))
        rows = [item.request.row for item in items if item.samples]
        chosen = {row: int(random.integers(1000)) for row in rows}
        inputs.set_newest(rows, torch.tensor(list(chosen.values()), dtype=torch.int64))
        for row, token in chosen.items():
            newest[row] = token
        known, pending = (pending, chosen) if in_flight else (chosen, {})
        for row, token in known.items():
            running[row].token_ids.append(token)


def test_single_tokens_stay_within_their_blocks_until_a_row_is_released() -> None:
    inputs, tables = HostInputs(ROWS, BLOCK), np.arange(ROWS * WIDTH).reshape(1, ROWS, WIDTH)
    requests = [new_request(0, 4), new_request(2, 3)]

    def stays(*chosen: Request) -> bool:
        items = []
        for request in chosen:
            num_new = len(request.token_ids) - request.num_computed
            items.append(ScheduledRequest(request, request.num_computed, num_new, True, 0, ()))
            request.num_computed += num_new
            request.token_ids.append(7)
        if inputs.advance(items) is not None:
            return True
        inputs.make(StepArrays.of(items, tables, BLOCK), tables)
        return False

    # The requests compute positions 4 and 3, 5 and 4, and so on: new blocks begin at 3, 6, 9.
    assert [stays(*requests) for _ in range(6)] == [False, False, True, False, False, True]
    assert [stays(*requests[:1]), stays(*requests[:1]), stays(*requests)] == [False, True, False]
    assert [stays(*requests), stays(*requests)] == [False, True]
    inputs.clear_row(3)  # whoever's it was: the next step is made anew
    assert [stays(*requests), stays(*requests), stays(*requests)] == [False, False, True]


def test_the_newest_tokens_of_rows() -> None:
    inputs = HostInputs(ROWS, BLOCK)
    inputs.set_newest([2, 0], torch.tensor([5, NO_TOKEN]))
    assert [inputs.is_clean(row) for row in range(ROWS)] == [True, True, False, True]
    inputs.clear_row(2)
    assert inputs.is_clean(2)
