"""A whole tool loop as a user of the openai package writes it, over HTTP, with recorded turns of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest
from chat_tools import ARGUMENTS, CALL, SECOND, TOOLS
from fake_client import FakeClient
from http_tools import real_server

from microvllm.runtime.text.chat_template import ChatTemplate

TEMPLATE = """
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}{% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}<assistant><think>"""
RESULTS = {"get_weather": "21 degrees", "get_time": "noon"}
TURNS = [
    f"I need both.</think>\n\nLet me look.\n{CALL}\n{SECOND}",
    "Easy.</think>\n\nIt is noon, and 21 degrees.",
]


@pytest.fixture
def model() -> Iterator[tuple[openai.OpenAI, FakeClient]]:
    client = FakeClient(max_model_len=8192)
    client.processor.template = ChatTemplate(TEMPLATE, {})
    client.recorded = TURNS
    with (
        real_server(client, reasoning_parser="qwen3") as port,
        closing(openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)) as sdk,
    ):
        yield sdk, client


def whole(sdk: openai.OpenAI, messages: list[Any]) -> Any:
    return sdk.chat.completions.create(model="fake-model", messages=messages, tools=TOOLS).choices[0]  # type: ignore[arg-type]


def streamed(sdk: openai.OpenAI, messages: list[Any]) -> Any:
    """By the package's own helper, which adds up the pieces and checks them."""
    with sdk.chat.completions.stream(model="fake-model", messages=messages, tools=TOOLS) as stream:  # type: ignore[arg-type]
        for event in stream:
            if event.type == "tool_calls.function.arguments.done":
                assert json.loads(event.arguments) == (ARGUMENTS if event.name == "get_weather" else {})
        return stream.get_final_completion().choices[0]


@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_tool_loop(model: tuple[openai.OpenAI, FakeClient], ask: Any) -> None:
    sdk, client = model
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    choice = ask(sdk, messages)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    assert choice.message.reasoning == "I need both."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "get_time"]
    assert json.loads(calls[0].function.arguments) == ARGUMENTS
    messages.append(choice.message)  # as the package gives it
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": RESULTS[call.function.name]} for call in calls
    ]
    choice = ask(sdk, messages)
    assert (choice.finish_reason, choice.message.content) == ("stop", "It is noon, and 21 degrees.")
    prompt = client.tokenizer.decode(client.submitted[1][0])
    call = json.dumps({"name": "get_weather", "arguments": ARGUMENTS}, ensure_ascii=False)
    assert f"<assistant>Let me look.<tool_call>{call}</tool_call>" in prompt
    assert prompt.endswith("<tool>21 degrees<tool>noon<assistant><think>")
