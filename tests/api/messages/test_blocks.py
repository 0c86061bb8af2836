"""Anthropic's Messages API: the content blocks that become of what a model said, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
from messages_case import added_up, sse

from microvllm.openai_compat.api.messages.create import Blocks, content_blocks
from microvllm.openai_compat.parsers.events import Arguments, Content, Event, Reasoning, ToolCall

CALL = [ToolCall(0, "call_1", "f"), Arguments(0, '{"a": '), Arguments(0, "[1, 2]}")]
OUTPUTS: list[tuple[list[Event], list[dict[str, Any]]]] = [
    ([], []),
    ([Content(" \n")], []),
    ([Content("\n"), Content("a"), Content("b")], [{"type": "text", "text": "\nab"}]),
    (
        [Reasoning("I "), Reasoning("see."), Content("\n\n"), Content("Yes.")],
        [{"type": "thinking", "thinking": "I see.", "signature": "s"}, {"type": "text", "text": "\n\nYes."}],
    ),
    (
        [Reasoning("Hm."), Content("\n"), *CALL, ToolCall(1, "call_2", "g")],
        [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": [1, 2]}},
            {"type": "tool_use", "id": "call_2", "name": "g", "input": {}},
        ],
    ),
    (
        [Content("Now"), *CALL, Content("done")],
        [
            {"type": "text", "text": "Now"},
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": [1, 2]}},
            {"type": "text", "text": "done"},
        ],
    ),
    (
        [Content("  "), Reasoning("x"), Content("y")],
        [{"type": "thinking", "thinking": "x", "signature": "s"}, {"type": "text", "text": "y"}],
    ),
    (
        CALL[:2],
        [{"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": None}}],
    ),
]


@pytest.mark.parametrize(("output", "blocks"), OUTPUTS)
def test_blocks(output: list[Event], blocks: list[dict[str, Any]]) -> None:
    assert content_blocks(output, "s") == blocks


@pytest.mark.parametrize(("output", "blocks"), OUTPUTS[:-1])
def test_streamed_blocks_add_up_to_the_whole_ones(output: list[Event], blocks: list[dict[str, Any]]) -> None:
    writer = Blocks("s")
    text = b"".join(writer.write([event]) for event in output) + writer.close()
    assert added_up(sse(text.decode())) == blocks
    assert writer.called == any(block["type"] == "tool_use" for block in blocks)
