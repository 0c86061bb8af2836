"""/v1/responses: calls, reasoning and messages as items, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import assert_no_callback_is_long, in_process
from responses_case import ASK, CUSTOM, FUNCTION, PARSERS, ask, both, called, playing, prompt_of

from microvllm.openai_compat.api.responses import items as items_module
from microvllm.openai_compat.api.responses.items import read_messages, seal_reasoning
from microvllm.runtime.errors import InvalidRequestError

GROUP = {"type": "namespace", "name": "files", "description": "d", "tools": [{**FUNCTION, "name": "read"}]}
THOUGHT = "<think>hm, so</think>"


def kinds_of(events: list[dict[str, Any]], item: int) -> list[str]:
    """The types of an item's events, a run of deltas once."""
    kinds = [event["type"].removeprefix("response.") for event in events if event.get("output_index") == item]
    return [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]


async def test_reasoning_calls_and_text_are_items() -> None:
    output = f"{THOUGHT}Let me see.{called('get_weather', city='Bern')}{called('get_weather', city='Basel')}"
    whole, events = await both(output, tools=[FUNCTION])
    reasoning, message, first, second = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, so"}]
    assert reasoning["summary"] == [] and message["content"][0]["text"] == "Let me see."
    assert [json.loads(call["arguments"]) for call in (first, second)] == [
        {"city": "Bern"},
        {"city": "Basel"},
    ]
    assert (first["name"], first["type"]) == ("get_weather", "function_call")
    assert len({item["id"] for item in whole["output"]}) == 4
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len("hm, so")
    ends = ("content_part.done", "output_item.done")
    assert kinds_of(events, 0) == [
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", *ends)
    ]
    assert kinds_of(events, 1) == [
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done", *ends)
    ]
    arguments = ("function_call_arguments.delta", "function_call_arguments.done")
    assert kinds_of(events, 2) == ["output_item.added", *arguments, "output_item.done"]
    deltas = [e["delta"] for e in events if e.get("output_index") == 2 and "arguments.delta" in e["type"]]
    assert len(deltas) > 2 and "".join(deltas) == first["arguments"]


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "name": "p", "schema": SCHEMA, "strict": True}, "json"),
    ],
)
async def test_the_form_of_a_text_is_enforced(form: dict[str, Any], kind: str | None) -> None:
    client = playing('{"x": 1}')
    _, answer = await ask(client, text={"format": form})
    enforced = client.submitted[-1][1].structured_outputs
    assert (enforced and enforced.kind) == kind and answer["text"]["format"] == form
    if kind == "json":
        assert json.loads(enforced.spec) == SCHEMA
    # Behind the reasoning, if there is some.
    client = playing(f'{THOUGHT}{{"x": 1}}')
    _, answer = await ask(client, text={"format": form}, args=PARSERS)
    enforced = client.submitted[-1][1].structured_outputs
    assert kind is None or client.tokenizer.decode(enforced.after, False) == "</think>"
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]


async def test_a_custom_tool_takes_a_text() -> None:
    whole, events = await both(called("patch", input='a "b"\nc'), tools=[CUSTOM])
    (item,) = whole["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", 'a "b"\nc')
    assert kinds_of(events, 0) == [
        *("output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done"),
        "output_item.done",
    ]


async def test_a_tool_of_a_namespace_has_both_names() -> None:
    whole, _ = await both(called("files__read", city="Bern"), tools=[GROUP])
    (item,) = whole["output"]
    assert (item["namespace"], item["name"]) == ("files", "read")


async def test_reasoning_is_handed_back_in_either_form() -> None:
    whole, _ = await both(f"{THOUGHT}so", include=["reasoning.encrypted_content"])
    reasoning, message = whole["output"]
    bare = {**reasoning, "content": None}
    for item in (reasoning, bare):
        assert read_messages(None, [item, message], 0) == [
            {"role": "assistant", "reasoning": "hm, so", "content": "so"}
        ]


async def test_log_probabilities_are_those_of_the_text() -> None:
    output = f"{THOUGHT}a<b>{called('get_weather')}"
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole, events = await both(output, tools=[FUNCTION], **options)
    logprobs = whole["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs) == "a<b>"
    assert {len(entry["top_logprobs"]) for entry in logprobs} == {2}
    streamed = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [entry for entries in streamed for entry in entries] == logprobs
    plain, _ = await both("abc", top_logprobs=1, args={})
    assert [entry["token"] for entry in plain["output"][0]["content"][0]["logprobs"]][:3] == ["a", "b", "c"]


async def test_a_call_that_is_cut_off_is_incomplete() -> None:
    output = called("get_weather", city="Bern")
    whole, _ = await both(output, tools=[FUNCTION], max_output_tokens=len(output) - 17)
    (item,) = whole["output"]
    assert (whole["status"], item["status"], item["arguments"]) == (
        "incomplete",
        "incomplete",
        '{"city": "Ber',
    )


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "patch", "files__read"}),
        ({"type": "function", "name": "get_weather"}, {"get_weather"}),
        ({"type": "custom", "name": "patch"}, {"patch"}),
        ({"type": "function", "name": "read", "namespace": "files"}, {"files__read"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]},
            {"patch"},
        ),
    ],
)
async def test_a_choice_is_enforced(choice: Any, names: set[str]) -> None:
    client = playing(called("patch", input="x"))
    await ask(client, tools=[FUNCTION, CUSTOM, GROUP], tool_choice=choice)
    form = client.submitted[-1][1].structured_outputs
    assert form is not None
    shown = {"get_weather", "patch", "files__read"}
    assert {name for name in shown if f'\\"{name}\\"' in form.spec} == names


async def test_tools_are_shown_in_one_form() -> None:
    client = playing("x")
    await ask(client, tools=[FUNCTION, CUSTOM, GROUP], tool_choice="auto")
    for name in ("get_weather", "patch", "files__read"):
        assert f"'name': '{name}'" in prompt_of(client)
    client = playing("x")
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]}
    await ask(client, tools=[FUNCTION, CUSTOM], tool_choice=choice)
    assert "patch" in prompt_of(client) and "get_weather" not in prompt_of(client)


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "done"}


def call_of(name: str = "f", arguments: str = '{"a": 1}') -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [{"role": "user", "content": "x"}, CALL, OUTPUT],
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [call_of()]},
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "done"},
            ],
        ),
        (
            [
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
                CALL,
                {**CALL, "call_id": "c2"},
            ],
            [
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "content": "so",
                    "tool_calls": [call_of(), {**call_of(), "id": "c2"}],
                }
            ],
        ),
        (
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [{"type": "reasoning", "summary": [], "encrypted_content": seal_reasoning("hm")}, CALL],
            [{"role": "assistant", "reasoning": "hm", "tool_calls": [call_of()]}],
        ),
        (
            [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}],
            [{"role": "system", "content": "a\n\nb"}],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}],
            [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
        ),
        (
            [{"type": "custom_tool_call", "call_id": "c1", "name": "p", "input": 'a"b', "namespace": "n"}],
            [{"role": "assistant", "tool_calls": [call_of("n__p", '{"input":"a\\"b"}')]}],
        ),
        # A call that was cut off, and is handed back.
        (
            [{**CALL, "arguments": '{"a": "b'}],
            [{"role": "assistant", "tool_calls": [call_of(arguments='{"a": "b"}')]}],
        ),
    ],
)
def test_items_become_messages(items: list[Any], messages: list[Any]) -> None:
    assert read_messages(None, items, 0) == messages


async def test_a_conversation_that_is_too_long_loses_its_first_turns() -> None:
    client = FakeClient(max_model_len=200)
    items = [{"role": "user", "content": f"{i} " + "x" * 30} for i in range(9)]
    body = {"input": items, "instructions": "Stay.", "max_output_tokens": 20}
    assert (await ask(client, **body))[0] == 400 and not client.submitted
    status, _ = await ask(client, **body, truncation="auto")
    text = prompt_of(client)
    assert status == 200 and text.startswith("system: Stay.\nuser: 6 x") and "user: 8 x" in text
    assert len(text) + 20 <= 200
    items = [{"role": "user", "content": "x" * 300}]
    assert (await ask(client, input=items, truncation="auto"))[1]["error"]["code"] == 400


async def test_the_prompt_is_counted() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        counted = (await http.post("/v1/responses/input_tokens", json=ASK)).json()
        assert not client.submitted
        answer = (await http.post("/v1/responses", json=ASK)).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": answer["usage"]["input_tokens"],
    }


def call_with(arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": arguments}


def test_whole_arguments_are_not_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "JsonText", None)
    long = json.dumps({"a": '\\"\n' * 1000})
    (message,) = read_messages(None, [call_with(long)], 0)
    assert message["tool_calls"][0]["function"]["arguments"] == long


def test_arguments_are_mended_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "MAX_MENDED_CHARS", 25)
    read_messages(None, [call_with('{"a": "bcd')] * 2, 0)
    with pytest.raises(InvalidRequestError, match=r"input\[2\]\.arguments: must be a JSON object"):
        read_messages(None, [call_with('{"a": "bcd')] * 3, 0)


async def test_reading_items_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    await ask()  # what is imported at first use
    cut_off = call_with('{"a": "' + "\\n" * 120_000)  # mending it takes 0.1 s

    async def ask_long() -> None:
        items = [cut_off, {"role": "user", "content": "hi"}]
        status, _ = await ask(FakeClient(max_model_len=1 << 20), input=items)
        assert status == 200

    await assert_no_callback_is_long(monkeypatch, ask_long, 0.05)
