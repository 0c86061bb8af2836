"""Slices of the vocabulary make masks faster, and change none."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from random_outputs import grammar_of

from microvllm.runtime.grammar.compiled import LEXERS, Start
from microvllm.runtime.grammar.translate import parser_limits
from microvllm.runtime.grammar.vocabulary import SLICES, make_tokenizer
from microvllm.runtime.request import StructuredOutput

PIECES = [
    "a",
    "bc",
    "def",
    "ghijk",
    "lmnopqr",
    "stuvwxyzab" * 2,
    "é",
    "世界",
    "the same again " * 3,
    '","',
    '"}',
]
TOKENS = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES), b"<end>"]
END = len(TOKENS) - 1


def matcher(schema: Any, slices: list[str]) -> LLMatcher:
    grammar = grammar_of(StructuredOutput(kind="json", spec=json.dumps(schema)))
    tokenizer = make_tokenizer(TOKENS, [END], [END], slices)
    return LLMatcher(tokenizer, grammar, limits=parser_limits(), log_level=0)


@pytest.mark.parametrize(
    "text",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 6},
        {"type": "string", "minLength": 4, "maxLength": 40},
        {"type": "string", "pattern": "^[a-z]{2,12}$"},
    ],
    ids=str,
)
def test_slices_change_no_mask(text: dict[str, Any]) -> None:
    schema = {"type": "array", "items": {"type": "object", "properties": {"x": text, "y": text}}}
    draw = np.random.default_rng(0)
    for _ in range(5):
        sliced, whole = matcher(schema, SLICES), matcher(schema, [])
        for _ in range(60):
            mask = sliced.compute_bitmask()
            assert mask == whole.compute_bitmask()
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
            token = int(draw.choice(allowed))
            if token == END:
                break
            assert sliced.consume_token(token) and whole.consume_token(token)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LLMatcher]:
    """The matchers that `make` has compiled, on a machine of 3 cores."""
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.usable_cores", lambda: 3)
    return []


def make(made: list[LLMatcher]) -> LLMatcher:
    made.append(matcher({"type": "string", "maxLength": 5}, SLICES))
    return made[-1]


def test_rows_of_different_lexers_have_matchers_of_their_own(
    made: list[LLMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.LEXERS_S", 60.0)  # of a machine that is busy, too
    start = Start(lambda: make(made))
    first = start.copy(0)
    assert len(made) == 1
    others = [start.copy(place) for place in range(2 * LEXERS)]
    assert len(made) == 3, "one for each core, made when they are used"
    assert first.consume_token(ord('"'))
    assert {other.compute_bitmask() for other in others} == {made[0].compute_bitmask()}


def test_a_grammar_that_takes_long_to_compile_has_one_lexer(
    made: list[LLMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.LEXERS_S", 0.0)
    start = Start(lambda: make(made))
    for place in range(2 * LEXERS):
        start.copy(place)
    assert len(made) == 1


def test_lexers_are_compiled_side_by_side(made: list[LLMatcher], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until the other is begun."""
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.LEXERS_S", 60.0)
    both = threading.Barrier(2, timeout=60)

    def together() -> LLMatcher:
        if made:
            both.wait()
        return make(made)

    start = Start(together)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(start.copy, (1, 2)))) == 2
    assert len(made) == 3
