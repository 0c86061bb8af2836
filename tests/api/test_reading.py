"""Bodies as `api/reading.py` reads them: lax values, both ways of reading, and which faults are named."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from microvllm.openai_compat.api.reading import _read_each, read_request, read_value
from microvllm.openai_compat.api.requests import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ProfileRequest,
    PromptRequest,
    PromptStreamRequest,
    TokenizeRequest,
    honoured_fields,
)
from microvllm.openai_compat.api.responses.requests import ResponsesRequest
from microvllm.openai_compat.errors import Fault
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams

USER = [{"role": "user", "content": "hi"}]


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(("value", "wanted"), [(5, 5), ("5", 5), ("-7", -7), (5.0, 5), ("+5", 5), ("5.0", 5)])
def test_integers(value: Any, wanted: int) -> None:
    assert read_value(int, value) == wanted


@pytest.mark.parametrize(
    "value", [True, 1.5, "x", "", " 5", "1_0", "\u0663", "9" * 40, [], {}, 1e300, "0x10", math.inf]
)
def test_not_integers(value: Any) -> None:
    with pytest.raises(Fault):
        read_value(int, value)


@pytest.mark.parametrize(
    "value", [True, "x", "", "nan", "inf", "1e999", [], {}, math.nan, math.inf, -math.inf, "\u0661"]
)
def test_not_numbers(value: Any) -> None:
    with pytest.raises(Fault):
        read_value(float, value)


@pytest.mark.parametrize(
    ("value", "wanted"), [(True, True), (0, False), ("TRUE", True), ("off", False), (1.0, True)]
)
def test_booleans(value: Any, wanted: bool) -> None:
    assert read_value(bool, value) is wanted


@pytest.mark.parametrize("value", [2, "x", "", [], {}, 0.5, "truetrue"])
def test_not_booleans(value: Any) -> None:
    with pytest.raises(Fault):
        read_value(bool, value)


KINDS = (
    *(CompletionRequest, ChatCompletionRequest, PromptRequest, PromptStreamRequest, TokenizeRequest),
    *(DetokenizeRequest, ProfileRequest),
)


SHAPES: list[Any] = [
    *(True, 0, 1, -1, 5, 1.0, 0.5, 1e18, 2.0**53, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 1e308),
    *("", "1", "5.0", "true", "on", "nan", "null", "a", "a\n", "a/b", "x" * 128, "x" * 129, "left", "none"),
    *([], [1], [-1], [True], [1.0], [2**63], ["a"], [None], [1] * 2000, ["a"] * 2000, USER, [TOOL]),
    *({}, {"5": 1}, {"5": "1"}, {"5": None}, {"include_usage": True}, {"include_usage": None}),
    *({"thinking": True}, {"thinking": 1}, {"thinking": "x" * 257}, {"tokenize": True}),
    *({"min_count": 3}, {"max_pattern_size": -1}, [{"function": {"name": "f", "strict": None}}]),
    *([{"type": None, "function": {"name": "f"}}], [{"function": {"name": ""}}]),
]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_of_reading_agree(kind: type[Body]) -> None:
    """What msgspec converts at once is accepted field by field, too, as the same value."""
    fields = honoured_fields(kind)
    whole = {"messages": USER, "prompt": "hi", "tokens": [1]}
    base = {name: whole[name] for name, field in fields.items() if field.required}
    for name in fields:
        for value in SHAPES:
            try:
                at_once = msgspec.convert({**base, name: value}, kind)
            except msgspec.ValidationError:
                continue
            one_by_one = _read_each(kind, {**base, name: value})
            assert one_by_one == at_once and repr(one_by_one) == repr(at_once), (name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_that_is_read_late_is_checked_with_the_sampling_parameters(kind: type[Body]) -> None:
    for name, field in honoured_fields(kind).items():
        kinds = getattr(field.type, "types", (field.type,))
        ranged = any(isinstance(part, msgspec.inspect.FloatType) and part.le is not None for part in kinds)
        assert not ranged or name in SamplingParams.__struct_fields__, name


def test_every_fault_is_named_in_the_order_of_the_body() -> None:
    body = {"stop": 5, "seed": "x", "temperature": -1, "tool_choice": "auto", "echo": 7, "n": None}
    with pytest.raises(InvalidRequestError) as caught:
        read_request(ChatCompletionRequest, body)
    assert str(caught.value) == (
        "messages: Field required. stop: Input should be a string or a list of strings. "
        "seed: Input should be a valid integer. echo: Input should be a valid boolean."
    )
    assert (caught.value.param, caught.value.kind) == ("body.messages", "Bad Request")


@pytest.mark.parametrize(
    ("kind", "body", "problem"),
    [
        (PromptRequest, {"prompt": "x", "stop": 5}, "stop: Input should be a string or a list of strings."),
        (CompletionRequest, {"prompt": "x", "stop": [5]}, "stop: Input should be a valid string."),
        (ResponsesRequest, {"input": 5}, "input: Input should be a string or a list."),
        (
            ChatCompletionRequest,
            {"messages": [], "tool_choice": 5},
            "tool_choice: Input should be 'auto', 'none', 'required' or an object.",
        ),
    ],
)
def test_all_that_is_allowed_is_named(kind: type[Body], body: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_request(kind, body)
    assert str(caught.value) == problem


def test_a_list_of_items_is_read_beside_a_lax_number() -> None:
    items = [{"role": "user", "content": "hi"}]
    request = read_request(ResponsesRequest, {"input": items, "temperature": "0.5"})
    assert (request.input, request.temperature) == (items, 0.5)
