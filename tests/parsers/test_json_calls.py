"""Calls as JSON objects."""

from __future__ import annotations

import json

import pytest
from parser_tools import argument_pieces, calls_of, check_splits, events_of, parse

HERMES = ("hermes", None)


def hermes(*calls: object) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)


def test_text_around_several_calls() -> None:
    arguments = {"text": 'a "</tool_call>" \\ ü \n <tool_call>', "tags": [{"x": [1.5e3, None]}, []]}
    first = hermes({"name": "write_file", "arguments": arguments})
    text = f"Let me see. 1 < 2\n\n{first}\n{hermes({'name': 'get_time', 'arguments': {}})}\n\nDone {{}}."
    message = check_splits(text, HERMES)
    assert calls_of(message) == [("write_file", arguments), ("get_time", {})]
    assert message.content == "Let me see. 1 < 2\n\nDone {}."
    assert message.tool_calls[0].arguments == json.dumps(arguments, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"arguments": {"city": "X"}, "name": "get_weather"}</tool_call>', {"city": "X"}),
        ('<tool_call>{"name": "get_weather", "parameters": {"city": "X"}}</tool_call>', {"city": "X"}),
        (
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"X\\"}"}</tool_call>',
            {"city": "X"},
        ),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "X"}</tool_call>', {"city": "X"}),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "X"}}}</tool_call>', {"city": "X"}),
        ('<tool_call>{"name": "get_weather", "arguments": {"days": 1</tool_call>', {"days": 1}),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "X"}}', {"city": "X"}),
        ('<tool_call>[{"name": "get_weather", "arguments": {"city": "X"}}]</tool_call>', {"city": "X"}),
        ('<tool_call>{"name": "get_weather", "arguments": null}</tool_call>', {}),
        ('<tool_call>\n```json\n{"name": "get_weather", "arguments": {}}\n```\n</tool_call>', {}),
        ("<tool_call>{'name': 'get_weather', 'arguments': {'city': 'X'}}</tool_call>", {"city": "X"}),
        ('<tool_call>{"name": "get_weather"}</tool_call>', {}),
        (
            '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": null}}\n',
            {},
        ),
    ],
)
def test_how_models_write_a_call(text: str, calls: object) -> None:
    message = check_splits(text, HERMES)
    assert calls_of(message) == [("get_weather", calls)] and message.content is None


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> tags.",
        "<tool_call>\n</tool_call>",
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get_weather", "city": "Paris"}</tool_call>',
        '<tool_call>{"city": "Paris"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_wea',
        '<tool_call>{"name": "get_weather", "argum',
        "<tool_call>\n```\nx = 1\n```\n</tool_call>",
        '{"name": "get_weather", "arguments": {}}',
    ],
)
def test_what_is_no_call_comes_back_as_it_is(text: str) -> None:
    message = check_splits(text, HERMES)
    assert message.content == text and not message.tool_calls


def test_a_limit_of_tokens_leaves_the_arguments_cut() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Par'
    assert check_splits(text, HERMES, cut_off=True).tool_calls[0].arguments == '{"city": "Par'
    assert calls_of(check_splits(text, HERMES)) == [("get_weather", {"city": "Par"})]


def test_arguments_stream() -> None:
    text = hermes({"name": "write_file", "arguments": {"text": "one two three"}})
    pieces = argument_pieces(events_of(text, HERMES))
    assert "".join(pieces) == '{"text": "one two three"}' and len(pieces) > 20


def test_only_the_first_call_unless_parallel() -> None:
    text = hermes({"name": "get_time", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "X"}})
    assert calls_of(parse(text, HERMES, parallel=False)) == [("get_time", {})]


def test_without_tools_nothing_is_a_call() -> None:
    text = hermes({"name": "get_time", "arguments": {}})
    assert parse(text, HERMES, tools=()).content == text
