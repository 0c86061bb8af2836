"""Reasoning of a chat: how it is separated from the answer, counted, left out and bounded."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tools import CALL, TOOLS, USER, ask, assembled
from fake_client import FakeClient, FakeTokenizer
from http_tools import in_process

from microvllm.openai_compat.api.parsing import ReasoningCounter
from microvllm.runtime.request import ThinkingBudget
from microvllm.runtime.text.chat_template import ChatTemplate

QWEN3 = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
THOUGHT = "\nLet me think: <b>\n"
OUTPUT = f"<think>{THOUGHT}</think>\n\nHello"
TAGS: dict[str, list[int]] = {"start": [*b"<think>"], "end": [*b"</think>"], "blank": [*b"\t\n\v\f\r "]}
# A template that opens the reasoning, closes it, or leaves it to the model.
TEMPLATE = (
    "{{ messages[-1].content }}\n{% if enable_thinking is defined %}"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("output", "content", "calls"),
    [(OUTPUT, "Hello", 0), (f"<think>{THOUGHT}</think>\n\n{CALL}", None, 1), ("Hello", "Hello", 0)],
)
@pytest.mark.parametrize("shown", [True, False])
async def test_reasoning_is_separated(output: str, content: str | None, calls: int, shown: bool) -> None:
    body: dict[str, Any] = {"include_reasoning": shown, "tools": TOOLS}
    _, answer, _ = await ask(output, args=QWEN3, **body)
    message = answer["choices"][0]["message"]
    thought = THOUGHT.strip("\n") if "<think>" in output else None
    assert message["content"] == content and len(message.get("tool_calls", [])) == calls
    assert message["reasoning"] == (thought if shown else None)
    spent = len(THOUGHT) if thought else 0
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": spent}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, chunks, _ = await ask(output, args=QWEN3, **options, **body)
    streamed = assembled(chunks)
    assert streamed.get("reasoning") == message["reasoning"]
    assert streamed["content"] == (content or "")
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": spent}


@pytest.mark.parametrize(
    ("parser", "output", "reasoning", "spent"),
    [
        ("qwen3", "Use <think>x</think>.", None, 0),
        ("qwen3", "\n <think>hm</think>\n<think>.</think>Use <think>.", "hm.", 3),
        ("deepseek_r1", "<think>hm</think>Use <think>.", "hm", 2),  # the template has opened it
    ],
)
@pytest.mark.parametrize("way", [{}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_only_tokens_of_the_reasoning_are_counted(
    parser: str, output: str, reasoning: str | None, spent: int, way: dict[str, Any]
) -> None:
    """A tag within an answer is text, and one that the model repeats is none."""
    _, answer, _ = await ask(output, args={"reasoning_parser": parser}, **way)
    message = assembled(answer) if way else answer["choices"][0]["message"]
    assert message.get("reasoning") == reasoning
    usage = answer[-1]["usage"] if way else answer["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": spent}


async def test_without_a_parser_it_is_text() -> None:
    _, answer, _ = await ask(OUTPUT, args={})
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (OUTPUT, None)
    assert answer["usage"]["completion_tokens_details"] is None


async def of_template(
    output: str, /, args: dict[str, Any] | None = None, **body: Any
) -> tuple[Any, FakeClient]:
    client = FakeClient(max_model_len=4096)
    client.processor.template = ChatTemplate(TEMPLATE, {})
    client.recorded = [output]
    async with in_process(client, **(args or {"reasoning_parser": "auto"})) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": USER, **body})
    return answer.json(), client


@pytest.mark.parametrize(
    ("body", "output", "reasoning", "content", "spent"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "hm</think>yes", "hm", "yes", 2),
        ({"reasoning_effort": "high"}, "hm</think>yes", "hm", "yes", 2),
        ({"reasoning_effort": "none"}, "yes", None, "yes", 0),
        ({}, "<think>hm</think>yes", "hm", "yes", 2),
        ({"reasoning_effort": "high", "max_tokens": 2}, "hm</think>yes", "hm", None, 2),
    ],
)
async def test_the_template_may_open_or_close_it(
    body: dict[str, Any], output: str, reasoning: str | None, content: str | None, spent: int
) -> None:
    answer, _ = await of_template(output, **body)
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": spent}


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("begun", "output", "reasoning", "content"),
    [
        ("The answer", " is 4", None, " is 4"),
        ("<think>\nHm, four", ", yes</think>\n\n4", ", yes", "4"),
        ("<think>hm</think>4", "2", None, "2"),
    ],
)
async def test_a_continued_message_may_have_begun_to_reason(
    parser: str, begun: str, output: str, reasoning: str | None, content: str
) -> None:
    client = FakeClient(max_model_len=4096)
    client.recorded = [output]
    talk = [*USER, {"role": "assistant", "content": begun}]
    async with in_process(client, reasoning_parser=parser) as http:
        body = {"messages": talk, "continue_final_message": True}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)


@pytest.mark.parametrize(
    ("body", "budget"),
    [
        ({}, ThinkingBudget(max_tokens=5, **TAGS)),
        ({"reasoning_effort": "high"}, ThinkingBudget(max_tokens=5, begun=True, **TAGS)),
        ({"reasoning_effort": "none"}, None),
        ({"thinking_token_budget": -1}, None),
        ({"thinking_token_budget": None}, None),
    ],
)
async def test_a_budget_reaches_the_engine(body: dict[str, Any], budget: ThinkingBudget | None) -> None:
    answer, client = await of_template("hm", **{"thinking_token_budget": 5, **body})
    assert "error" not in answer
    assert client.submitted[0][1].thinking == budget


@pytest.mark.parametrize(
    ("value", "param"), [(5, "thinking_token_budget"), (-2, "body.thinking_token_budget")]
)
async def test_a_budget_that_cannot_be_kept_is_refused(value: int, param: str) -> None:
    status, answer, client = await ask("x", args={}, thinking_token_budget=value)
    assert (status, answer["error"]["param"], client.submitted) == (400, param, [])


async def test_special_tokens_are_kept_where_they_mark_something() -> None:
    """As text they would be missing, and what they mark would be lost."""
    for output, kept in (("x", False), ("<think>a</think>x", True)):
        client = FakeClient(max_model_len=4096)
        client.tokenizer.id_to_token = lambda token: "</think>"  # type: ignore[method-assign]
        client.recorded = [output]
        async with in_process(client, **({"reasoning_parser": "qwen3"} if kept else {})) as http:
            await http.post("/v1/chat/completions", json={"messages": USER})
        assert client.submitted[0][1].skip_special_tokens is not kept


class Merging(FakeTokenizer):
    """Spells a bracket with the line break behind it, as where no tag is a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace(">\n", "\x00"), add_special_tokens)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "high"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required"}, None),  # then there is no reasoning
    ],
)
async def test_what_follows_the_end_of_the_reasoning_needs_a_token_for_it(
    body: dict[str, Any], field: str | None
) -> None:
    client = FakeClient(max_model_len=4096)
    client.processor.template = ChatTemplate(TEMPLATE, {})
    client.tokenizer = Merging()
    async with in_process(client, **QWEN3) as http:
        answer = (await http.post("/v1/chat/completions", json={"messages": USER, **body})).json()
        if field is None:
            form = client.submitted[0][1].structured_outputs
            assert form is not None and form.after == form.opens == []
        else:
            assert answer["error"]["param"] == field and "reasoning" in answer["error"]["message"]
        plain = (await http.post("/v1/chat/completions", json={"messages": USER})).json()
        assert plain["usage"]["completion_tokens_details"] is None  # not known


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
def test_the_counter_sees_tags_across_pieces(cut: int) -> None:
    ids = [9, 1, 1, 2, 5, 5, 3, 3, 4, 5, 1, 2, 3, 5]
    for start, inside, expected in (([1, 2], False, 5), ([1, 2], True, 9), ([8], True, 7), ([8], False, 0)):
        counter = ReasoningCounter(start, [3, 4], inside=inside)
        for first in range(0, len(ids), cut):
            counter.add(ids[first : first + cut])
        assert counter.count == expected
