"""The mask for the sampler that comes from outside, by a grammar that counts: each token is a residue."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from model_tools import BACKENDS, generate_ids, make_engine, make_request, run_requests, variant_folder

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.worker.bitmask import Generated, Output
from microvllm.runtime.worker.logits import LogitRules
from microvllm.runtime.worker.model_runner import ModelGraphRunner

MODULUS = 5
MASKED_PRIORITY = 7  # marks the requests of the grammar


class Residues:
    """The token at place n of a masked output leaves n when it is divided by `MODULUS`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.rows: set[int] = set()
        self.asked = 0

    def set_row(self, row: int, request: EngineRequest, output: Sequence[int]) -> None:
        if request.priority == MASKED_PRIORITY:
            self.rows.add(row)

    def clear_row(self, row: int) -> None:
        self.rows.discard(row)

    def concerns(self, rows: Sequence[int]) -> bool:
        return not self.rows.isdisjoint(rows)

    def bits(
        self, rows: Sequence[int], output: Callable[[int], Output]
    ) -> tuple[list[int], list[np.ndarray]]:
        self.asked += 1
        masked = [i for i, row in enumerate(rows) if row in self.rows]
        tokens = np.arange(-(-self.vocab_size // 32) * 32)
        allowed = []
        for i in masked:
            known, in_flight = output(i)
            assert not in_flight
            allowed.append(tokens % MODULUS == len(known) % MODULUS)
        return masked, list(np.packbits(allowed, axis=1, bitorder="little").view(np.int32))


def request(request_id: int, masked: bool) -> EngineRequest:
    made = make_request(request_id, [5, 6, 7 + request_id], 12)
    values = {name: getattr(made, name) for name in made.__struct_fields__}
    return EngineRequest(**{**values, "priority": MASKED_PRIORITY if masked else 0})


def test_generated_tokens_are_those_behind_the_prompt() -> None:
    """Indexed and cut as a copy of them."""
    tokens = [5, 6, 7, 1, 2, 3]
    places = [None, *range(-5, 6)]
    for prompt_len in (0, 3, 6):
        copy, view = tokens[prompt_len:], Generated(tokens, prompt_len)
        assert list(view) == copy and len(view) == len(copy)
        for index in range(-len(copy), len(copy)):
            assert view[index] == copy[index]
        for start, end, step in itertools.product(places, places, (None, 2, -1)):
            assert view[start:end:step] == copy[start:end:step]
        with pytest.raises(IndexError):
            view[len(copy)]


@pytest.mark.parametrize("vocab_size", [7, 32, 33, 100])
def test_bits_are_tokens_of_their_row(vocab_size: int) -> None:
    rules = LogitRules(4, vocab_size)
    rules.mask = mask = Residues(vocab_size)
    rules.set_row(3, request(0, masked=True), [5, 6, 7], 3)
    rules.set_row(1, request(1, masked=False), [5, 6, 7], 3)
    logits = torch.zeros(3, vocab_size)
    last = torch.zeros(3, dtype=torch.int64)
    rules.apply(logits, [1, 3, 0], [], lambda i: ([8, 9], False), last)
    assert logits[[0, 2]].eq(0).all()
    expected = torch.where(torch.arange(vocab_size) % MODULUS == 2, 0.0, -torch.inf)
    assert torch.equal(logits[1], expected)
    assert rules.concern([1, 3]) and not rules.concern([1, 0])
    rules.clear_row(3)
    assert not rules.concern([1, 3]) and mask.asked == 1
    rules.apply(logits, [1, 3, 0], [], lambda i: ([], False), last)
    assert mask.asked == 1, "nothing is masked any more"


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_and_other_requests_in_one_batch(backend: str) -> None:
    engine = make_engine(variant_folder("llama-tied"), attention_backend=backend, async_scheduling=False)
    plain = generate_ids(engine, [[5, 6, 7 + i] for i in range(4)], 12)
    runner = engine.core._runner
    assert isinstance(runner, ModelGraphRunner)
    mask = Residues(engine.config.spec.vocab_size)
    runner._sampler.use_mask(mask)
    answers = run_requests(engine, [request(i, masked=i % 2 == 1) for i in range(4)])
    assert [answers[0], answers[2]] == [plain[0], plain[2]]
    for answer in (answers[1], answers[3]):
        assert len(answer) == 12 and [token % MODULUS for token in answer] == [n % MODULUS for n in range(12)]
    assert not mask.rows or engine.core.scheduler._released_rows, "rows are released with the next step"
