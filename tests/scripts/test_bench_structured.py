"""The text of the benchmark of structured output: it fits the schema, and is what a batch then writes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import bench_structured
import numpy as np
import pytest
from jsonschema import Draft202012Validator

VOCAB = 128


class Masks:
    """Of the grammar of a batch: all tokens but 7; row 1 has none."""

    def bits(self, rows: Any, output: Any) -> tuple[list[int], list[np.ndarray]]:
        return self._bits(rows)

    def bits_of(self, scheduled: Any) -> tuple[list[int], list[np.ndarray]]:
        return self._bits([item.request.row for item in scheduled])

    def _bits(self, rows: Any) -> tuple[list[int], list[np.ndarray]]:
        at = [i for i, row in enumerate(rows) if row != 1]
        return at, [np.array([~(1 << 7), -1, -1, -1], np.int32) for _ in at]


def step(row: int, length: int) -> Any:
    request = SimpleNamespace(row=row, prompt_len=5)
    return SimpleNamespace(request=request, start=4 + length, num_new=1)


def allowed(masks: list[np.ndarray]) -> list[list[int]]:
    bits = np.unpackbits(np.stack(masks).view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


def test_a_text_fits_the_schema() -> None:
    lines = {**bench_structured.SCHEMA, "minItems": 1}
    made = [bench_structured.shop(seed, 5) for seed in range(20)]
    for text in made:
        assert not list(Draft202012Validator(lines).iter_errors(json.loads(text)))
    assert len(set(made)) == 20 and {"\n" in text for text in made} == {True, False}
    tokens = bench_structured.tokens_of(lambda text: list(text.encode()), 3, 2000)
    assert len(tokens) == 2000 and bytes(tokens) == bench_structured.shop(3, 100).encode()[:2000]


def test_a_batch_writes_its_texts() -> None:
    masks: Any = Masks()
    bench_structured.Replay(masks, [[5, 31], [6, 6], [127, 64]], VOCAB)
    for length in (0, 1):
        expected = [[[5], [127]], [[31], [64]]][length]
        at, bits = masks.bits_of([step(row, length) for row in range(3)])
        assert at == [0, 2] and allowed(bits) == expected
        at, bits = masks.bits([2, 0], lambda i, n=length: ([0] * n, False))
        assert allowed(bits) == expected[::-1]


def test_a_text_that_the_masks_do_not_allow_ends_the_benchmark() -> None:
    masks: Any = Masks()
    bench_structured.Replay(masks, [[5, 7]], VOCAB)
    with pytest.raises(SystemExit, match="does not allow token 7 of text 0 at 1"):
        masks.bits_of([step(0, 1)])
