"""What is streamed adds up to the whole answer: any output, in any format, at the endpoints with tools."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from chat_tools import TOOLS, USER, assembled
from fake_client import FakeClient
from http_tools import events, in_process
from hypothesis import example, given, settings
from hypothesis import strategies as st
from responses_case import without_identity

from microvllm.openai_compat.api.messages.create import tool_input

FORMATS = [
    {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
    {"tool_call_parser": "pythonic"},
    {"tool_call_parser": "qwen3_coder", "reasoning_parser": "deepseek_r1"},
    {"tool_call_parser": "openai", "reasoning_parser": "openai_gptoss"},
]
PIECES = [
    *("  ", "\n", "\n\n\n", "hm", "ü<", "<t", "<think>", "</think>", "</tool_call>", "<tool_call>\n"),
    *('{"name": "get_weather", "arguments": {"city": "ü"}}', '{"name": "get_time"', "}", '"', "[get_time()]"),
    *("<function=get_weather>\n", "<parameter=city>\nx\n</parameter>\n", "</function>\n", "<|message|>x"),
    *("<|channel|>analysis", "<|channel|>final", "<|channel|>commentary to=functions.get_time", "<|end|>"),
]


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The flags, what the model writes, and how the request cuts that."""
    output = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=8)))
    options: dict[str, Any] = {"max_tokens": draw(st.integers(1, 400)), "interval": draw(st.integers(1, 7))}
    if output and draw(st.booleans()):
        start = draw(st.integers(0, len(output) - 1))
        options["stop"] = output[start : start + draw(st.integers(1, 3))]
    options["parallel"] = draw(st.booleans())
    return draw(st.sampled_from(FORMATS)), output, options


def data(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls", [])]


def chat_body(options: dict[str, Any]) -> dict[str, Any]:
    stop = {"stop": options["stop"]} if "stop" in options else {}
    shown = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": options["parallel"], **shown, **stop}
    return {**body, "max_tokens": options["max_tokens"]}


def check_chat(whole: str, streamed: str) -> None:
    choice, chunks = json.loads(whole)["choices"][0], events(streamed)
    message, found = choice["message"], assembled(chunks)
    assert found.get("content", "") == (message["content"] or "")
    assert found.get("reasoning", "") == (message["reasoning"] or "")
    assert calls(found) == calls(message) and found["finish_reason"] == choice["finish_reason"]
    parts = [part for chunk in chunks for part in chunk["choices"]]
    entries = [entry for part in parts for entry in (part["logprobs"] or {}).get("content", [])]
    assert entries == choice["logprobs"]["content"]
    assert [token for part in parts for token in part.get("token_ids") or []] == choice["token_ids"]
    assert chunks[-1]["usage"] == {
        name: value for name, value in json.loads(whole)["usage"].items() if value is not None
    }


def message_body(options: dict[str, Any]) -> dict[str, Any]:
    stop = {"stop_sequences": [options["stop"]]} if "stop" in options else {}
    tools = [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
    ]
    choice = {"type": "auto", "disable_parallel_tool_use": not options["parallel"]}
    return {
        **{"messages": USER, "tools": tools, "tool_choice": choice, "max_tokens": options["max_tokens"]},
        **stop,
    }


def check_message(whole: str, streamed: str) -> None:
    expected, blocks, end = json.loads(whole), [], {}
    pieces: list[str] = []
    for event in data(streamed):
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
            pieces.append("")
        elif event["type"] == "content_block_delta":
            kind, delta = event["delta"]["type"], event["delta"]
            if kind == "signature_delta":
                blocks[-1]["signature"] = delta["signature"]
            else:
                name = {"input_json_delta": "partial_json"}.get(kind, kind.removesuffix("_delta"))
                pieces[-1] += delta[name]
        elif event["type"] == "message_delta":
            end = {**event["delta"], "usage": event["usage"]}
    for block, text in zip(blocks, pieces, strict=True):
        if block["type"] == "tool_use":
            block["input"] = tool_input(text)
        else:
            block[block["type"]] = text
    for block in [*blocks, *expected["content"]]:
        block.pop("id", None)
        block.pop("signature", None)
    assert blocks == expected["content"]
    assert end == {name: expected[name] for name in end}


def response_body(options: dict[str, Any]) -> dict[str, Any]:
    body = chat_body(options)
    return {
        **{"input": "weather?", "tools": [{"type": "function", **tool["function"]} for tool in TOOLS]},
        **{name: body[name] for name in ("stop", "parallel_tool_calls", "top_logprobs") if name in body},
        "max_output_tokens": options["max_tokens"],
    }


def check_response(whole: str, streamed: str) -> None:
    found = []
    for response in (json.loads(whole), data(streamed)[-1]["response"]):
        found.append(json.loads(without_identity(response)))
        for item in found[-1]["output"]:
            item.pop("call_id", None)
            for part in item.get("content", []) if item["type"] == "message" else []:
                # A token is a byte here. Line breaks next to tags are written anew.
                shown = "".join(entry["token"] for entry in part["logprobs"])
                assert shown.replace("\n", "") == part["text"].replace("\n", "").replace("\ufffd", "")
    assert found[0] == found[1]


ENDPOINTS = {
    "/v1/chat/completions": (chat_body, check_chat, {"stream_options": {"include_usage": True}}),
    "/v1/messages": (message_body, check_message, {}),
    "/v1/responses": (response_body, check_response, {}),
}
PLAIN = {"max_tokens": 400, "interval": 1, "parallel": True}


@pytest.mark.parametrize("path", ENDPOINTS)
@settings(max_examples=40)
@given(request=requests())
@example(request=(FORMATS[0], "  <think>x</think>y", PLAIN))
@example(request=(FORMATS[0], "<think>x</think> <think>y</think> z", PLAIN))
@example(request=(FORMATS[1], "\n\n\n[get_weather(city='a')]hm", PLAIN))
@example(request=(FORMATS[0], '<tool_call>\n{"name": "get_time" STOP', {**PLAIN, "stop": " STOP"}))
@example(request=(FORMATS[0], "é<</tool_call>é", PLAIN))
@example(request=(FORMATS[0], "</parameter>", {**PLAIN, "interval": 2}))
@example(request=(FORMATS[2], "</think><function=get_weather>\nü<", PLAIN))
@example(request=(FORMATS[0], "aaaa", {**PLAIN, "stop": "aaab"}))
def test_streamed_is_whole(path: str, request: tuple[dict[str, Any], str, dict[str, Any]]) -> None:
    args, output, options = request
    make, check, more = ENDPOINTS[path]
    interval = {} if path == "/v1/messages" else {"stream_interval": options["interval"]}

    async def both() -> list[str]:
        client = FakeClient(max_model_len=4096)
        client.recorded = [output]
        texts = []
        async with in_process(client, **args) as http:
            for fields in ({}, {"stream": True, **more, **interval}):
                answer = await http.post(path, json={**make(options), **fields})
                assert answer.status_code == 200, answer.text
                texts.append(answer.text)
        return texts

    check(*asyncio.run(both()))
