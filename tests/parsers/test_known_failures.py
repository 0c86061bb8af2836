"""Outputs that parsers of other servers are reported to lose or to spoil."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from parser_tools import calls_of, check_splits, parse

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.xml_calls import _short

QWEN = ("qwen3_coder", "qwen3")
OPEN = "<tool_call>\n<function=write_file>\n"
CLOSE = "</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("formats", "text", "calls"),
    [
        pytest.param(
            QWEN,
            f"{OPEN}<parameter=path>\na\n</parameter>\n<parameter=tags>\n[1]\n{CLOSE}",
            [("write_file", {"path": "a", "tags": [1]})],
            id="a value without its end in front of the call's (vllm#57699)",
        ),
        pytest.param(
            QWEN,
            f"{OPEN}<parameter=path>\na\n<parameter=text>\nb\n</parameter>\n{CLOSE}",
            [("write_file", {"path": "a", "text": "b"})],
            id="a value without its end in front of the next",
        ),
        pytest.param(
            QWEN,
            f"{OPEN}<parameter=path>\na</parameter>\n<parameter=text>b</parameter>{CLOSE}",
            [("write_file", {"path": "a", "text": "b"})],
            id="values without lines of their own (llama.cpp#26763)",
        ),
        pytest.param(
            QWEN,
            f"{OPEN}<parameter=text>\n\n  a\n\n</parameter>\n</tool_call>",
            [("write_file", {"text": "\n  a\n"})],
            id="a call without its end, and blank lines that belong to the value",
        ),
        pytest.param(
            QWEN,
            f"{OPEN}<parameter=text>\nUse </parameter> and </function> and {{}}.\n</parameter>\n{CLOSE}",
            [("write_file", {"text": "Use </parameter> and </function> and {}."})],
            id="the tags named in a value",
        ),
        pytest.param(
            QWEN,
            f"<think>I write <tool_call> now.\n{OPEN}<parameter=path>\na\n</parameter>\n{CLOSE}",
            [("write_file", {"path": "a"})],
            id="a call in reasoning that never ends (vllm#39056)",
        ),
        pytest.param(
            ("hermes", None),
            'So <tool_call> it is.\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
            [("get_time", {})],
            id="a stray tag in front of a call (vllm#53638)",
        ),
        pytest.param(
            ("jamba", None),
            '<tool_calls>[{"name": "get_time", "arguments": {}}, '
            '{"name": "get_weather", "arguments": {"city": "X"}}]</tool_calls>',
            [("get_time", {}), ("get_weather", {"city": "X"})],
            id="arguments behind empty ones (vllm#47901)",
        ),
        pytest.param(
            ("llama3_json", None),
            '{"name": "write_file", "parameters": {"text": "}A{\\"]"}}',
            [("write_file", {"text": '}A{"]'})],
            id="brackets in a string (ollama#12017)",
        ),
        pytest.param(
            ("glm47", "glm45"),
            "\n<think>Hm.</think><tool_call>get_time</tool_call>",
            [("get_time", {})],
            id="a call without arguments in one line (vllm#44326)",
        ),
        pytest.param(
            ("openai", "openai_gptoss"),
            '<|channel|>analysis to=functions.write_file code<|message|>\n{"path":"","text":"a"}<|call|>',
            [("write_file", {"path": "", "text": "a"})],
            id="a call in the channel of the reasoning (vllm#42454)",
        ),
        pytest.param(
            ("openai", "openai_gptoss"),
            ' to=functions.write_file<|channel|>commentary json<|message|>{"text":"a"}<|call|>',
            [("write_file", {"text": "a"})],
            id="a recipient in the header that the prompt began",
        ),
    ],
)
def test_calls(formats: tuple[str, str | None], text: str, calls: list[tuple[str, Any]]) -> None:
    assert calls_of(check_splits(text, formats)) == calls


def test_the_name_of_a_tag_in_prose() -> None:
    """With tools or without: the text goes on (club-3090#1191)."""
    text = "The literal token `<tool_call>` begins a call, and `<think>` the reasoning. Done."
    assert check_splits(text, QWEN).content == text
    assert check_splits(text, QWEN, tools=()).content == text


@pytest.mark.parametrize(
    "end", ["</parameter", "</", "\n</param", "</parameter>\n</fun", "</parameter>\n<par"]
)
def test_a_limit_of_tokens_leaves_no_tag_in_an_argument(end: str) -> None:
    """Not even a part of one (vllm#55495)."""
    call = parse(f"{OPEN}<parameter=text>\nabc{end}", QWEN, cut_off=True).tool_calls[0]
    assert call.arguments in ('{"text": "abc', '{"text": "abc"')


def test_text_within_a_call_comes_behind_it() -> None:
    """So that a stream does not leave a call that it has begun (vllm#52418)."""
    text = f"{OPEN}<parameter=path>\na\n</parameter>\nand\n<parameter=text>\nb\n</parameter>\n{CLOSE}"
    message = check_splits(text, ("qwen3_coder", None))
    assert calls_of(message)[0][1].keys() >= {"path"}


def test_what_is_no_recipient_of_a_function_is_none() -> None:
    text = "<|channel|>commentary to=assistant<|message|>Hm.<|end|>"
    message = check_splits(text, ("openai", "openai_gptoss"))
    assert not message.tool_calls and message.content == "Hm."


def test_few_names_are_looked_for_in_values() -> None:
    """Compiling a set of thousands holds the event loop, however short they are."""
    assert [*_short(["a", "b" * 129, "c"])] == ["a", "c"]
    assert 200 < len([*_short([chr(0x4E00 + i) for i in range(8000)])]) < 300


@pytest.mark.parametrize("names", [["a" * 20_000], [f"{n}{'a' * 200}" for n in range(5000)]])
def test_names_of_arguments_take_no_memory_with_the_square_of_their_length(names: list[str]) -> None:
    """A value whose end was forgotten ends at the next argument: each beginning of its tag was kept."""
    function = Function("f", {"properties": {name: {"type": "string"} for name in ("a", "b", *names)}})
    values = "<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n"
    tracemalloc.start()
    try:
        found = parse(f"<tool_call>\n<function=f>\n{values}{CLOSE}", QWEN, tools=[function])
        assert calls_of(found) == [("f", {"a": "1", "b": "2"})]
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
