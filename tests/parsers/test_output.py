"""Reasoning between tags, and what it has to do with calls."""

from __future__ import annotations

import pytest
from parser_tools import calls_of, check_splits, events_of, parse

from microvllm.openai_compat.parsers.events import Content, Reasoning

QWEN3 = ("hermes", "qwen3")
R1 = (None, "deepseek_r1")
CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm, 1 < 2.\n</think>\n\nYes.\n", None, "Hm, 1 < 2.", "Yes.\n"),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>\nHm.</think>Yes.", True, "Hm.", "Yes."),
        ("\n\n</think>\n\nYes.", True, None, "Yes."),
        ("Hm. </thin", True, "Hm. </thin", None),
        ("Yes.", None, None, "Yes."),
        ("Yes.", False, None, "Yes."),
        ("A <think> tag </think>.", None, None, "A <think> tag </think>."),
    ],
)
def test_qwen3(text: str, opened: bool | None, reasoning: str | None, content: str | None) -> None:
    message = check_splits(text, QWEN3, prompt_ends_in_reasoning=opened)
    assert (message.reasoning, message.content) == (reasoning, content)


def test_deepseek_r1_begins_with_reasoning_unless_the_prompt_closed_it() -> None:
    assert check_splits("Hm.\n</think>\nYes.", R1).reasoning == "Hm."
    assert check_splits("<think>Hm.</think>Yes.", R1).content == "Yes."
    assert check_splits("Hm.", R1).reasoning == "Hm."
    assert check_splits("Yes.", R1, prompt_ends_in_reasoning=False).content == "Yes."


def test_a_call_in_reasoning_is_one_if_its_function_is_declared() -> None:
    message = check_splits(f"<think>\nI call it.\n{CALL}\nWait.</think>\n\nDone.", QWEN3)
    assert calls_of(message) == [("get_time", {})]
    assert (message.reasoning, message.content) == ("I call it.\nWait.", "Done.")
    mentioned = 'I write <tool_call>{"name": "f", "arguments": {}}</tool_call> <tool_call> then.'
    message = check_splits(mentioned, QWEN3, prompt_ends_in_reasoning=True)
    assert message.reasoning == mentioned and not message.tool_calls


def test_reasoning_between_calls() -> None:
    message = check_splits(f"<think>A</think>\n{CALL}\n<think>B</think>\n{CALL}", QWEN3)
    assert len(message.tool_calls) == 2 and (message.reasoning, message.content) == ("AB", None)


def test_text_streams_at_once() -> None:
    text = "a < b [c] {d} <b> </ x <think less <tool kit"
    assert parse(text, QWEN3).content == text
    shown = ""
    ids = iter(events_of(text, QWEN3))
    for event in ids:
        assert isinstance(event, Content)
        shown += event.text
    assert shown == text


def test_reasoning_streams() -> None:
    events = events_of("<think>abc</think>", QWEN3)
    assert events == [Reasoning("a"), Reasoning("b"), Reasoning("c")]
