"""Penalties and biases from tables on the GPU against those in plain torch; interpreted without a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from microvllm.ops.gpu import rules as kernels
from microvllm.runtime.core.plan import NO_TOKEN
from microvllm.runtime.request import MAX_LOGIT_BIAS, EngineRequest, SamplingParams
from microvllm.runtime.worker.gpu_rules import GpuRules
from microvllm.runtime.worker.logits import LogitRules, Output

VOCAB, ROWS = 5000, 9  # more than one program a row
WAYS: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4, "logit_bias": {0: 3.0, 4999: -100.0, 7: 0.5}},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 0.1, "logit_bias": {7: -9.0}},
    {"logit_bias": dict.fromkeys(range(4090, 4100), 2.0)},
]


@pytest.fixture
def pair() -> tuple[GpuRules, LogitRules]:
    ours = GpuRules(ROWS, VOCAB, DEVICE)
    ours.use_tables()
    return ours, LogitRules(ROWS, VOCAB)


def logits_of(seed: int, m: int = len(WAYS)) -> Tensor:
    logits = torch.randn(m, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, 11] = -torch.inf
    return logits


def nothing(i: int) -> Output:
    return (), False


def admit(pair: Sequence[LogitRules], row: int, way: dict[str, Any], output: int = 0, **more: Any) -> None:
    """A prompt and `output` tokens, in which some come often."""
    draw = random.Random(row)
    tokens = [draw.choice([draw.randrange(20), draw.randrange(VOCAB)]) for _ in range(30 + output)]
    for rules in pair:
        rules.set_row(row, EngineRequest(row, tokens[:30], SamplingParams(**way), **more), tokens, 30)


def compare(pair: tuple[GpuRules, LogitRules], rows: list[int], seed: int) -> None:
    """Within a graph and outside."""
    ours, reference = pair
    logits = logits_of(seed, len(rows))
    expected, eager = logits.clone(), logits.clone().to(DEVICE)
    reference.apply(expected, rows, [], nothing, torch.zeros(len(rows), dtype=torch.int64))
    ours.apply(eager, rows, [], nothing, torch.zeros(len(rows), dtype=torch.int64, device=DEVICE))
    tables = ours._tables
    assert tables is not None
    captured = tables.change(logits.to(DEVICE), torch.tensor(rows, device=DEVICE))
    for found in (eager, captured):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", [0, 50])
def test_tables_change_logits_as_the_rules_say(pair: tuple[GpuRules, LogitRules], output: int) -> None:
    """Rows in another order than their numbers, with and without an output from before a preemption."""
    rows = [8, 2, 3, 7, 0, 5]
    for row, way in zip(rows, WAYS, strict=True):
        admit(pair, row, way, output)
    compare(pair, rows, 1)
    draw = random.Random(5)
    for step in range(3):
        tokens = [draw.choice([3, 4, draw.randrange(VOCAB), NO_TOKEN]) for _ in rows]
        pair[1].observe(rows, torch.tensor(tokens))
        there = torch.tensor(tokens, device=DEVICE)
        if step == 1:
            pair[0].observe(rows, there)
        else:  # as a captured graph does
            assert pair[0]._tables is not None
            pair[0]._tables.count(torch.tensor(rows, dtype=torch.int32, device=DEVICE), there)
        compare(pair, rows, step)
    compare(pair, rows[:2], 9)
    assert not pair[0].concern(rows), "no row needs more than a graph"


def test_a_cleared_row_has_none(pair: tuple[GpuRules, LogitRules]) -> None:
    for row, way in enumerate(WAYS):
        admit(pair, row, way, 20)
    for row in range(len(WAYS)):
        for rules in pair:
            rules.clear_row(row)
    tables = pair[0]._tables
    assert tables is not None
    logits = logits_of(0)
    same = tables.change(logits.to(DEVICE), torch.arange(len(WAYS), device=DEVICE))
    assert torch.equal(same.cpu(), logits)
    admit(pair, 4, WAYS[1], 4)  # a row that had more rules
    compare(pair, [4], 3)


def test_as_many_biases_as_a_request_may_have_fit(pair: tuple[GpuRules, LogitRules]) -> None:
    admit(pair, 2, {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)})
    tables = pair[0]._tables
    assert tables is not None and int(tables._num_biases[2]) == MAX_LOGIT_BIAS


def test_other_rules_are_no_graph_s(pair: tuple[GpuRules, LogitRules]) -> None:
    admit(pair, 0, {"presence_penalty": 1.0})
    admit(pair, 1, {"presence_penalty": 1.0, "allowed_token_ids": [1, 2, 3]})
    admit(pair, 2, {}, bad_word_ids=[[5]])
    ours = pair[0]
    assert [ours.concern([row]) for row in range(4)] == [False, True, True, False]
    assert ours.concern([0, 2]) and not ours.concern([0, 3])
    ours.clear_row(2)
    assert not ours.concern([0, 2])


class Graph:
    """Stands for a captured graph: runs its step again."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.replay = step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [[0, 1, 2], [0, 2], []], ids=str)
def test_masks_are_applied_behind_the_logits(
    pair: tuple[GpuRules, LogitRules], at: list[int], dtype: torch.dtype
) -> None:
    """Of a batch of 3 in a graph of 4; the rows without a mask keep all their tokens."""
    ours, made = pair[0], logits_of(7, 4).to(dtype)
    static, chosen = made.clone().to(DEVICE), list[Tensor]()

    def choose(logits: Tensor) -> Tensor:
        chosen.append(logits.float().cpu())
        return logits.argmax(-1)

    def replay() -> None:
        static.copy_(made)

    graph: Any = Graph(replay)  # type: ignore[arg-type]
    capture: Any = lambda step: (Graph(step), step())  # noqa: E731
    ours.capture(graph, capture, choose, static, torch.arange(4, device=DEVICE))
    for seed in (1, 2):  # the masks of the step before are gone
        graph.replay()
        draw = np.random.default_rng(seed)
        allowed = draw.random((len(at), -(-VOCAB // 32) * 32)) < 0.3
        ours.replay_masked(4, 3, at, list(np.packbits(allowed, axis=1, bitorder="little").view(np.int32)))
        expected = made.float()
        for i, row in zip(at, allowed, strict=True):
            expected[i].masked_fill_(~torch.from_numpy(row[:VOCAB]), -torch.inf)
        assert torch.equal(chosen[-1][:3], expected[:3])


def test_masks_with_other_rules_are_no_graph_s(pair: tuple[GpuRules, LogitRules]) -> None:
    admit(pair, 1, {"presence_penalty": 1.0})
    ours = pair[0]
    assert not ours.only_masked([0]), "nothing is captured"
    ours._masked[4] = Graph(lambda: torch.zeros(1))  # type: ignore[assignment]
    assert ours.only_masked([0, 2]) and not ours.only_masked([0, 1])


def test_counts_stop_at_what_a_word_holds(pair: tuple[GpuRules, LogitRules]) -> None:
    tables = pair[0]._tables
    assert tables is not None
    most = kernels.MAX_COUNT.value
    tables.set_penalties(3, (0.0, 1.0, 1.0), [9], [9] * (most - 1))
    rows, tokens = torch.tensor([3], device=DEVICE), torch.tensor([9], device=DEVICE)
    for expected in (most - 1, most, most):
        changed = tables.change(torch.zeros(1, VOCAB, device=DEVICE), rows)
        assert int(-changed[0, 9]) == expected and not changed[0, :9].any()
        tables.count(rows, tokens)


def test_without_tables_all_rules_are_applied_outside() -> None:
    rules = GpuRules(ROWS, VOCAB, DEVICE)
    reference = LogitRules(ROWS, VOCAB)
    admit((rules, reference), 1, WAYS[4], 6)
    assert rules.concern([1]) and not rules.concern([0])
    logits = logits_of(2, 1)
    ours = logits.clone().to(DEVICE)
    rules.apply(ours, [1], [], nothing, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    reference.apply(logits, [1], [], nothing, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(ours.cpu(), logits)
    rules.clear_row(1)
