"""Keeps penalties, token counts, biases and masks in tables on the GPU, where captured graphs apply them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.cuda import CUDAGraph

from microvllm.ops.gpu.bitmask import apply_bitmask
from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.rules import RuleTables
from microvllm.runtime.request import EngineRequest
from microvllm.runtime.worker.logits import LogitRules
from microvllm.runtime.worker.penalties import Penalties
from microvllm.runtime.worker.transfers import on_device


class TablePenalties(Penalties):
    """The penalties of every row, for steps that are not captured."""

    def __init__(self, tables: RuleTables, device: torch.device) -> None:
        self._tables = tables
        self._device = device

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        params = request.params
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        self._tables.set_penalties(row, penalties, tokens[:prompt_len], tokens[prompt_len:])

    def clear_row(self, row: int) -> None:
        self._tables.clear_penalties(row)

    def count(self, rows: Sequence[int], tokens: Tensor) -> None:
        self._tables.count(on_device(rows, torch.int64, self._device), tokens)

    def apply(self, logits: Tensor, at: Sequence[int], rows: Sequence[int]) -> None:
        index, row = on_device([at, rows], torch.int64, self._device).unbind(0)
        self._tables.penalise(logits, index, row)


class GpuRules(LogitRules):
    """The rules of every row, and two graphs for each size of decode step: one applies those in the tables.

    The other applies masks. These come when the logits are computed: its launch is all that is left then.
    Without tables (`use_tables`) there is neither, and rules are applied as on a CPU.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        super().__init__(num_rows, vocab_size, device)
        self._tables: RuleTables | None = None
        self._others: set[int] = set()  # rows with rules that are not in the tables
        self._graphs: dict[int, CUDAGraph] = {}
        self._masked: dict[int, CUDAGraph] = {}
        shape = num_rows, -(-vocab_size // 32)
        self._bits = torch.full(shape, -1, dtype=torch.int32, device=device)  # by the place in the batch
        self._places = torch.arange(num_rows, device=device)
        self._sent_bits = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")

    def use_tables(self) -> None:
        """Keep penalties and biases where graphs apply them; before the first request and the first graph."""
        device = self._bits.device
        self._tables = RuleTables(self._num_rows, self._vocab_size, device, pdl=can_launch_early(device))
        self._penalties = TablePenalties(self._tables, device)

    def set_row(self, row: int, request: EngineRequest, tokens: Sequence[int], prompt_len: int) -> None:
        super().set_row(row, request, tokens, prompt_len)
        params = request.params
        if params.allowed_token_ids is not None or request.bad_word_ids:
            self._others.add(row)
        if params.logit_bias and self._tables is not None:
            self._tables.set_biases(row, params.logit_bias)

    def clear_row(self, row: int) -> None:
        if self._tables is not None and row in self._rules and len(self._rules[row].bias_ids):
            self._tables.clear_biases(row)
        self._others.discard(row)
        super().clear_row(row)

    def concern(self, rows: Sequence[int]) -> bool:
        """Whether any of the rows has rules that no graph applies."""
        if self._tables is None or (self.mask is not None and self.mask.concerns(rows)):
            return super().concern(rows)
        return self._budgets.concern(rows) or not self._others.isdisjoint(rows)

    def capture(
        self,
        graph: CUDAGraph,
        capture: Callable[[Callable[[], Tensor]], tuple[CUDAGraph, Any]],
        choose: Callable[[Tensor], Tensor],
        logits: Tensor,
        rows: Tensor,
    ) -> None:
        """Capture the choices of tokens by tables and masks, behind a graph that makes logits: [size, vocab].

        choose: how tokens are chosen from others; rows: [size]. Rows and logits exist after a replay.
        """
        tables, size = self._tables, len(rows)
        if tables is None:
            return

        def step() -> Tensor:
            tokens = choose(tables.change(logits, rows))
            tables.count(rows, tokens)
            return tokens

        def masked() -> Tensor:
            apply_bitmask(logits, self._bits[:size], self._places[:size])
            return choose(logits)

        graph.replay()
        self._graphs[size], _ = capture(step)
        self._masked[size], _ = capture(masked)

    def replay(self, size: int, rows: Sequence[int]) -> None:
        """Choose again behind the graph of this size, if any of the rows is in the tables."""
        if self._graphs and self._rules and not self._rules.keys().isdisjoint(rows):
            self._graphs[size].replay()

    def only_masked(self, rows: Sequence[int]) -> bool:
        """Whether masks are all the rules of these rows."""
        return bool(self._masked) and self._rules.keys().isdisjoint(rows) and not self._budgets.concern(rows)

    def replay_masked(self, size: int, count: int, at: Sequence[int], bits: Sequence[np.ndarray]) -> None:
        """Choose again behind the graph of this size; of `count` rows those at `at` have a mask.

        bits: as in `take_out`. The step before has been read, so that its masks may be overwritten.
        """
        sent = self._sent_bits[:count].numpy()
        if len(at) == count:
            np.stack(bits, out=sent)
        else:
            sent.fill(-1)
            for i, mask in zip(at, bits, strict=True):
                sent[i] = mask
        self._bits[:count].copy_(self._sent_bits[:count], non_blocking=True)
        self._masked[size].replay()
