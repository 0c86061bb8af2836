"""What a parser holds back, and what it costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from parser_tools import FUNCTIONS, argument_pieces, events_of, parse

from microvllm.openai_compat.parsers.events import Content, Reasoning
from microvllm.openai_compat.parsers.formats import TOOL_FORMATS
from microvllm.openai_compat.parsers.harmony import TAGS
from microvllm.openai_compat.parsers.registry import make_parser
from microvllm.openai_compat.parsers.scanner import Scanner

NAMES = [function.name for function in FUNCTIONS]
HEADS = {
    "llama3_json": [f'{{"name": "{name}", "parameters": {{' for name in NAMES] + ['{"type": "function"'],
    "pythonic": [f"[{name}(" for name in NAMES],
}
TEXT = (
    'a < b <a> [x] [1, 2] {y} {"z": [{}]} <tool <tool_calls <function <|python <think <thin </think '
    '[TOOL_CALL \n\n{"name": 1} {"name": "get_w"} {"type": "object", {"type": 1 [get_weather, 1] [gett(] '
    "<|chann|> <｜tool <|tool_call <minimax functools \n\n\n\n\n\nEnd.\n"
)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_only_what_may_begin_a_tag_is_held_back(name: str) -> None:
    """And up to two line breaks, which would be a part of the tag."""
    form = TOOL_FORMATS[name]
    starts = [*TAGS] if name == "openai" else [*form.starts, "<think>"]
    heads = HEADS["pythonic"] if "[" in starts else HEADS["llama3_json"] if "{" in starts else []
    parser = make_parser(name, "qwen3", tools=FUNCTIONS)
    shown = ""
    for index, char in enumerate(TEXT):
        for event in parser.feed(char):
            assert isinstance(event, Content)
            shown += event.text
        held = TEXT[len(shown) : index + 1]
        assert TEXT.startswith(shown)
        begun = held.lstrip("\n")
        assert len(held) - len(begun) <= 2
        assert any(start.startswith(begun) for start in starts + heads), held
    assert not any(start.startswith("End.") for start in starts)
    assert shown + "".join(event.text for event in parser.end() if isinstance(event, Content)) == TEXT


def test_reasoning_is_held_back_no_longer() -> None:
    parser = make_parser("hermes", "qwen3", tools=FUNCTIONS, prompt_ends_in_reasoning=True)
    for char in "Hm. 1 < 2 [x] {y} </p> so":
        events = parser.feed(char)
        assert char in "</" or [type(event) for event in events] == [Reasoning], char


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("hermes", '<tool_call>{"name": "write_file", "arguments": {"text": "', '"}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=write_file><parameter=text>\n", "\n</parameter></function>"),
        ("mistral", '[TOOL_CALLS]write_file[ARGS]{"text": "', '"}'),
        ("pythonic", '[write_file(text="', '")]'),
    ],
)
def test_a_string_argument_arrives_with_its_text(name: str, before: str, after: str) -> None:
    parser = make_parser(name, None, tools=FUNCTIONS)
    parser.feed(before)
    for char in "one two three [4] {5} <6>":
        pieces = argument_pieces(parser.feed(char))
        assert char == "<" or "".join(pieces).endswith(char)
    parser.feed(after)
    assert not argument_pieces(parser.end())


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the lines of the parsers that are run, and the characters that are copied for each piece."""
    count = [0]
    add = Scanner.add

    def counting_add(self: Scanner, text: str) -> None:
        add(self, text)
        count[0] += len(self.text)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if "parsers" not in frame.f_code.co_filename:
            return None
        count[0] += event == "line"
        return trace

    Scanner.add = counting_add  # type: ignore[method-assign]
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)
        Scanner.add = add  # type: ignore[method-assign]


HERMES = '<tool_call>{"name": "write_file", "arguments": '
HARD = {
    "plain text": ("hermes", "word < and ", ""),
    "beginnings of tags": ("hermes", "<tool_cal", ""),
    "tags": ("hermes", "<tool_call>", ""),
    "reasoning": ("hermes", "word ", "<think>"),
    "brackets": ("hermes", "[", HERMES + '{"tags": '),
    "braces": ("hermes", '{"a":', HERMES),
    "closing brackets": ("hermes", "]", HERMES + '{"a": {'),
    "escapes": ("hermes", '\\"', HERMES + '{"text": "'),
    "bare words": ("hermes", "word ", HERMES + '{"text": '),
    "white space": ("hermes", "\n", HERMES),
    "arguments in front of the name": ("hermes", "[", '<tool_call>{"arguments": {"tags": '),
    "keys": ("hermes", '"a": 1, ', '<tool_call>{"name": "write_file", '),
    "values between tags": ("qwen3_coder", "</parameter>\n<", "<function=write_file><parameter=text>"),
    "numbers between tags": ("qwen3_coder", "1", "<function=write_file><parameter=mode>"),
    "arguments between tags": ("glm45", "<arg_key>a</arg_key><arg_value>", "<tool_call>write_file"),
    "bare heads": ("llama3_json", '{"name": "write_file", ', ""),
    "Python": ("pythonic", "[write_file(a=", ""),
    "headers": ("openai", "<|channel|>commentary to=", ""),
    "long names": ("mistral", "name", "[TOOL_CALLS]"),
}


@pytest.mark.parametrize("kind", HARD)
def test_the_cost_is_linear(kind: str) -> None:
    name, unit, before = HARD[kind]

    def cost(size: int) -> int:
        text = before + unit * (size // len(unit))
        with counted() as count:
            events_of([text[start : start + 3] for start in range(0, len(text), 3)], (name, "qwen3"))
        return count[0]

    small, large = cost(600), cost(2400)
    assert large < 4.5 * small + 500


def test_ten_thousand_brackets() -> None:
    """Nothing recurses."""
    nested = "[" * 10_000 + "1" + "]" * 10_000
    text = f'<tool_call>{{"name": "write_file", "arguments": {{"tags": {nested}}}}}</tool_call>'
    assert parse(text, ("hermes", None)).tool_calls[0].arguments == f'{{"tags": {nested}}}'
    xml = f"<function=write_file><parameter=tags>{nested}</parameter></function>"
    assert parse(xml, ("qwen3_coder", None)).tool_calls[0].arguments == f'{{"tags": {nested}}}'


def test_a_megabyte() -> None:
    arguments = json.dumps({"text": "x" * 2**20})
    text = f'<tool_call>{{"name": "write_file", "arguments": {arguments}}}</tool_call>'
    pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    assert "".join(argument_pieces(events_of(pieces, ("hermes", None)))) == arguments
