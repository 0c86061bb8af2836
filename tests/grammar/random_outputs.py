"""Draws outputs of grammars from random logits, for the tests and scripts/check_schemas.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from jsonschema import FormatChecker
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer

from microvllm.runtime.grammar.masks import Row
from microvllm.runtime.grammar.translate import Specials, check, parser_limits
from microvllm.runtime.grammar.vocabulary import make_tokenizer
from microvllm.runtime.request import StructuredOutput

# Text pieces as a tokenizer has them, beside the single bytes: some span several tokens of JSON.
PIECES = (
    ' the| a|ing|name|true|null|":|": "|", "|"}|"]|{"|["|}, {"|]]|}}|10|00| "|\n  |\n\n|\t\t|é|世界|😀|\\n'
)
NO_END = 400  # tokens after which an output that goes on is given up


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id; the last one ends an output."""

    tokens: Sequence[bytes]
    tokenizer: LLTokenizer
    bias: np.ndarray  # [len(tokens)] of the logits

    @classmethod
    def of(cls, tokens: Sequence[bytes], special_ids: Sequence[int] = ()) -> Vocabulary:
        """Add an end token. Short tokens and the end are likely: a random string would never close."""
        end = len(tokens)
        bias = np.array([4.0 * (len(token) == 1) for token in tokens] + [6.0])
        bias[[i for i, token in enumerate(tokens) if len(token) == 1 and token in b'"]},:']] = 7.0
        every = [*tokens, b"<end>"]
        return cls(every, make_tokenizer(every, [*special_ids, end], [end]), bias)


def small_vocabulary() -> Vocabulary:
    return Vocabulary.of([*(bytes([byte]) for byte in range(256)), *(p.encode() for p in PIECES.split("|"))])


def draw(
    form: StructuredOutput,
    grammar: str,
    vocabulary: Vocabulary,
    random: np.random.Generator,
    closing: bytes = b"",
) -> bytes | None:
    """Return one output at temperature 1; None if it has not ended after `NO_END` tokens.

    `closing` is written at times where it may be; its bytes are the ids of their tokens.
    """
    matcher = LLMatcher(vocabulary.tokenizer, grammar, limits=parser_limits(), log_level=0)
    row = Row(form, lambda: matcher, len(vocabulary.tokens))
    row.advance([])
    taken: list[int] = []
    end = len(vocabulary.tokens) - 1
    while len(taken) < NO_END:
        if closing and random.random() < 0.1 and matcher.validate_tokens([*closing]) == len(closing):
            taken += closing
            row.advance([*closing])
            continue
        mask = row.mask(len(taken))
        assert row.problem is None and mask is not None, row.problem
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        logits = random.gumbel(size=len(allowed)) + 2 * random.normal(size=len(allowed))
        token = int(allowed[(logits + vocabulary.bias[allowed]).argmax()])
        assert vocabulary.tokens[token], "an id without a text"
        if token == end:
            assert matcher.is_accepting(), "an end where the grammar does not end"
            return b"".join(vocabulary.tokens[token] for token in taken)
        taken.append(token)
        row.advance([token])
    return None


def faults(schema: Any, output: bytes) -> list[str]:
    """Why an output is not JSON that follows the schema. Numbers are exact: a float would round multiples."""
    value, schema = (json.loads(text, parse_float=Decimal) for text in (output, json.dumps(schema)))
    validator = validator_for(schema, default=validator_for({"$schema": SCHEMA}))
    return [error.message for error in validator(schema, format_checker=FormatChecker(())).iter_errors(value)]


SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def grammar_of(form: StructuredOutput) -> str:
    """Raises `InvalidRequestError`."""
    return check(form, Specials(512, {}))
