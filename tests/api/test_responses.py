"""/v1/responses with the official SDK: whole, streamed, in the background, and from turn to turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import openai
import pydantic
import pytest
from chat_tools import HERMES, WEATHER
from fake_client import FakeClient
from http_tools import eventually, in_process, real_server, timed_callbacks
from openai.types.responses import Response, ResponseInputItemParam, ResponseStreamEvent, ToolParam
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from process_tools import PATIENCE_S

from microvllm.openai_compat.api.requests import GenerationRequest, honoured_fields
from microvllm.openai_compat.api.responses import items as items_module
from microvllm.openai_compat.api.responses.items import PREFIXES, read_messages, seal_reasoning
from microvllm.openai_compat.api.responses.requests import ResponsesRequest
from microvllm.openai_compat.api.responses.store import UNFINISHED, References, ResponseStore, StoredResponse
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.detokenizer import TextDelta

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
FUNCTION = {"type": "function", **WEATHER["function"], "strict": False}
CUSTOM = {"type": "custom", "name": "patch", "description": "Patch files"}
GROUP = {"type": "namespace", "name": "files", "description": "d", "tools": [{**FUNCTION, "name": "read"}]}
ASK: dict[str, Any] = {"model": "fake-model", "input": "hi", "temperature": 0}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; checks the framing, the numbers and every event against the SDK's types."""
    found = []
    for frame in text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert text.endswith("\n\n")
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def playing(*outputs: str) -> FakeClient:
    """A model that writes these outputs, one for each request."""
    client = FakeClient(max_model_len=1 << 16)
    client.recorded = list(outputs)
    return client


def prompt_of(client: FakeClient) -> str:
    """The last prompt that the model was given."""
    return client.tokenizer.decode(client.submitted[-1][0], False)


async def ask(
    client: FakeClient | None = None, /, *, args: dict[str, Any] | None = None, **body: Any
) -> tuple[int, Any]:
    """Status and answer; the events of a stream."""
    async with in_process(client or FakeClient(), **(HERMES if args is None else args)) as http:
        answer = await http.post("/v1/responses", json={**ASK, **body})
    whole = answer.status_code != 200 or not body.get("stream")
    return answer.status_code, answer.json() if whole else events_of(answer.text)


def without_identity(response: dict[str, Any]) -> str:
    """A response without its own and its times."""
    suffix = response["id"].removeprefix("resp_")
    kept = {name: value for name, value in response.items() if name not in ("created_at", "completed_at")}
    return json.dumps(kept).replace(suffix, "ID")


async def test_a_stream_ends_in_the_whole_response() -> None:
    _, whole = await ask(min_tokens=5)
    Response.model_validate(whole)
    _, events = await ask(min_tokens=5, stream=True)
    assert without_identity(events[-1]["response"]) == without_identity(whole)
    assert whole["status"] == "completed" and whole["output"][0]["content"][0]["text"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 2 and kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta",) * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_output_that_is_cut_off_is_incomplete(stream: bool) -> None:
    _, answer = await ask(max_output_tokens=3, ignore_eos=True, stream=stream)
    if stream:
        assert answer[-1]["type"] == "response.incomplete"
        answer = answer[-1]["response"]
    assert (answer["status"], answer["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert answer["output"][0]["status"] == "incomplete"
    assert (answer["usage"]["output_tokens"], answer["max_output_tokens"]) == (3, 3)


async def test_usage_and_options_are_reported() -> None:
    body = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "top_p": 0.5,
        "truncation": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"summary": "auto"},
    }
    client = FakeClient()
    _, answer = await ask(client, **body)
    for name, value in body.items():
        assert answer[name] == ({"effort": None, **value} if name == "reasoning" else value), name
    prompt, usage = "system: Be brief.\nuser: hi\nassistant: ", answer["usage"]
    assert prompt_of(client) == prompt
    assert usage["input_tokens"] == len(prompt)
    assert usage["total_tokens"] == len(prompt) + usage["output_tokens"]


# ---- fields -------------------------------------------------------------------------------------------

# A value that asks for something, for every field that is refused.
DEMANDING: dict[str, Any] = {
    "conversation": "conv_1",
    "prompt": {"id": "pmpt_1"},
    "context_management": [{"type": "compaction"}],
    "moderation": {"model": "m"},
    "access_programs": {"cyber": "standard"},
    "background_options": {"completion_window": "2h"},
    "prompt_cache_options": {"mode": "explicit"},
    "stream_options": {"include_obfuscation": True},
    "max_tokens": 5,
    "n": 2,
    "echo": True,
    "logprobs": True,
}


def test_every_field_of_the_sdk_is_honoured_ignored_or_refused() -> None:
    known = {*honoured_fields(ResponsesRequest), *ResponsesRequest.ignored, *ResponsesRequest.refused}
    asked = {*ResponseCreateParamsBase.__annotations__, "stream"}
    assert asked <= known, asked - known


def types_of(union: Any) -> set[str]:
    """The values of `type` in a union of the SDK's dictionaries."""
    hints = [get_type_hints(kind)["type"] for kind in get_args(union)]
    words = [part for hint in hints for literal in (hint, *get_args(hint)) for part in get_args(literal)]
    return {word for word in words if isinstance(word, str)}


async def test_every_type_of_the_sdk_is_read_or_refused_by_name() -> None:
    """An empty item of a known type lacks something, any other is named."""
    known = {"input": {"message", *PREFIXES, "item_reference"}, "tools": {"function", "custom", "namespace"}}
    async with in_process(FakeClient()) as http:
        for field, union in (("input", ResponseInputItemParam), ("tools", ToolParam)):
            kinds = types_of(union)
            assert len(kinds) > 15 and known[field] <= kinds
            for kind in kinds:
                answer = await http.post("/v1/responses", json={**ASK, field: [{"type": kind}]})
                error, problem = answer.json()["error"], f"{field}[0].type: '{kind}' is not supported"
                assert answer.status_code == 400 and error["param"] == field
                assert error["message"].startswith(problem) == (kind not in known[field]), error


# Fields that give the form of the output.
FORMS = {
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    "guided_whitespace_pattern",
}
# A value for each field that other endpoints that generate have, too.
SHARED: dict[str, Any] = {
    "model": "fake-model",
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 2,
    "stop": ["q"],
    "stop_token_ids": [100],
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 10},
    "allowed_token_ids": [120, 121],
    "bad_words": ["x"],
    "ignore_eos": True,
    "min_tokens": 2,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3},
    "truncate_prompt_tokens": 9,
    "truncation_side": "right",
    "stream": True,
    "stream_interval": 2,
    "return_tokens_as_token_ids": True,
    "cache_salt": "tenant",
    "priority": 3,
    "request_id": "mine",
}


async def test_the_fields_of_all_endpoints_mean_the_same() -> None:
    shared = honoured_fields(GenerationRequest).keys() - ResponsesRequest.refused.keys()
    assert shared - FORMS == SHARED.keys()
    client, options = FakeClient(), {"top_logprobs": 2, "thinking_token_budget": 5}
    async with in_process(client, reasoning_parser="qwen3") as http:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "logprobs": True}
        await http.post("/v1/chat/completions", json={**SHARED, **options, **chat})
        body = {**SHARED, **options, "input": "hi", "max_output_tokens": 5}
        answer = await http.post("/v1/responses", json=body)
    as_chat, as_response = client.submitted
    assert as_chat == as_response
    events = events_of(answer.text)
    texts = [event for event in events if event["type"] == "response.output_text.delta"]
    assert events[-1]["response"]["id"] == "resp_mine"
    assert texts[0]["logprobs"][0]["token"].startswith("token_id:")


@pytest.mark.parametrize("name", list(DEMANDING))
async def test_what_is_refused_is_named(name: str) -> None:
    status, answer = await ask(**{name: DEMANDING[name]})
    assert (status, answer["error"]["param"]) == (400, name) and name in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"type": "message", "role": "x", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1_0"}]}, "input[0].id"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "encrypted_content"),
        ({"input": []}, "input must not be empty"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: 'web_search'"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "'mcp'"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "'file_search'"),
        ({"tools": [{"type": "code_interpreter", "container": "x"}]}, "'code_interpreter'"),
        ({"tools": [{"type": "computer"}]}, "'computer'"),
        ({"tools": [{"type": "image_generation"}]}, "'image_generation'"),
        ({"tools": [{"type": "local_shell"}]}, "'local_shell'"),
        ({"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]}, "tools[0].format.type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools[1].name"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{**WEATHER["function"], "type": "function", "name": "a b"}]}, "tools[0].name: "),
        ({"tools": [{**CUSTOM, "name": "a b"}]}, "tools[0].name: "),
        (
            {"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}},
            "not text.format and",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"effort": "much"}}, "reasoning"),
        ({"include": ["everything"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "thing"}}}},
            "text.format",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_is_wrong_is_named(body: dict[str, Any], place: str) -> None:
    client = FakeClient()
    status, answer = await ask(client, **body)
    error = answer["error"]
    assert status == 400 and place in error["message"] + error["param"] and not client.submitted, answer
    assert (error["param"] or "").removeprefix("body.") in body, error


async def test_a_model_that_does_not_exist_is_404() -> None:
    status, answer = await ask(model="gpt-9")
    assert (status, answer["error"]["param"]) == (404, "model")


# ---- calls and reasoning ------------------------------------------------------------------------------

PARSERS = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
THOUGHT = "<think>hm, so</think>"


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def both(output: str, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole response and the events of the same output, which have to agree."""
    body = {"args": PARSERS, **body}
    _, whole = await ask(playing(output), **body)
    Response.model_validate(whole)
    _, events = await ask(playing(output), **body, stream=True)
    streamed = json.loads(without_identity(events[-1]["response"]))
    expected = json.loads(without_identity(whole))
    for response in (streamed, expected):  # the ids of calls are drawn
        for item in response["output"]:
            assert item.get("call_id", "call_")[:5] == "call_"
            item.pop("call_id", None)
    assert streamed == expected
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    return whole, events


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


# ---- items and messages -------------------------------------------------------------------------------

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


# ---- from turn to turn --------------------------------------------------------------------------------


async def test_a_response_continues_the_one_before() -> None:
    client = playing("one", "two", "three")
    async with in_process(client) as http:
        answers, previous = [], None
        for text in ("a", "b", "c"):
            body = {**ASK, "input": text, "previous_response_id": previous, "instructions": f"I{text}"}
            answers.append((await http.post("/v1/responses", json=body)).json())
            previous = answers[-1]["id"]
        assert prompt_of(client) == (
            "system: Ic\nuser: a\nassistant: one\nuser: b\nassistant: two\nuser: c\nassistant: "
        )
        read = await http.get(f"/v1/responses/{previous}")
        assert read.json() == answers[-1] and answers[-1]["previous_response_id"] == answers[1]["id"]
        # The conversation ends where one of its responses is gone.
        gone = (await http.delete(f"/v1/responses/{answers[0]['id']}")).json()
        assert gone == {"id": answers[0]["id"], "object": "response", "deleted": True}
        assert (await http.get(f"/v1/responses/{answers[0]['id']}")).status_code == 404
        error = (await http.post("/v1/responses", json={**ASK, "previous_response_id": previous})).json()
        assert error["error"]["param"] == "previous_response_id"


async def test_an_item_can_be_handed_back_as_a_reference() -> None:
    client = playing("one", "two", "three")
    async with in_process(client) as http:
        first = (await http.post("/v1/responses", json=ASK)).json()
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        items = [{"role": "user", "content": "hi"}, reference, {"role": "user", "content": "go on"}]
        second = (await http.post("/v1/responses", json={**ASK, "input": items})).json()
        assert prompt_of(client) == "user: hi\nassistant: one\nuser: go on\nassistant: "
        # What was stored is the item itself.
        await http.post("/v1/responses", json={**ASK, "previous_response_id": second["id"]})
        assert prompt_of(client).startswith("user: hi\nassistant: one\nuser: go on\nassistant: two\n")


async def test_nothing_is_kept_that_should_not_be() -> None:
    async with in_process(FakeClient()) as http:
        answer = (await http.post("/v1/responses", json={**ASK, "store": False})).json()
        assert answer["store"] is False
        assert (await http.get(f"/v1/responses/{answer['id']}")).status_code == 404
    async with in_process(FakeClient(), max_response_store_bytes=0) as http:
        answer = (await http.post("/v1/responses", json=ASK)).json()
        assert answer["store"] is False
        for body in ({"store": True}, {"previous_response_id": answer["id"]}, {"background": True}):
            error = (await http.post("/v1/responses", json={**ASK, **body})).json()["error"]
            assert error["param"] == next(iter(body)) and "--max-response-store-bytes" in error["message"]


async def test_an_id_is_taken_once() -> None:
    async with in_process(FakeClient()) as http:
        body = {**ASK, "request_id": "mine"}
        first = (await http.post("/v1/responses", json=body, headers={"x-request-id": "theirs"})).json()
        again = await http.post("/v1/responses", json=body)
        other = (await http.post("/v1/responses", json=ASK, headers={"x-request-id": "mine"})).json()
        bodies = [{**ASK, "request_id": "both", "input": text, "background": True} for text in "ab"]
        both = await asyncio.gather(*(http.post("/v1/responses", json=body) for body in bodies))
        kept = (await http.get("/v1/responses/resp_both/input_items")).json()["data"][0]["content"][0]["text"]
    assert first["id"] == "resp_mine" != other["id"] and kept == "a"
    assert sorted(answer.status_code for answer in both) == [200, 400]
    assert (again.status_code, again.json()["error"]["param"]) == (400, "request_id")


async def test_input_items_are_listed() -> None:
    async with in_process(FakeClient()) as http:
        items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "abc"]
        answer = (await http.post("/v1/responses", json={**ASK, "input": items})).json()
        path = f"/v1/responses/{answer['id']}/input_items"
        listed = (await http.get(path)).json()
        assert [item["id"] for item in listed["data"]] == ["msg_c", "msg_b", "msg_a"]
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "c"}]
        page = (await http.get(path, params={"order": "asc", "after": "msg_a", "limit": 1})).json()
        assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_b", "msg_b", True)
        for query in ({"order": "up"}, {"limit": "0"}, {"limit": "x"}, {"after": "msg_z"}):
            assert (await http.get(path, params=query)).json()["error"]["param"] in query


# ---- in the background, and how it ends ---------------------------------------------------------------


async def finished(http: Any, name: str) -> dict[str, Any]:
    while (response := (await http.get(f"/v1/responses/{name}")).json())["status"] in UNFINISHED:
        await asyncio.sleep(0)
    return response


async def test_a_response_in_the_background() -> None:
    client = playing("one", "two")
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        Response.model_validate(queued)
        assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
        done = await finished(http, queued["id"])
        assert (done["status"], done["output"][0]["content"][0]["text"]) == ("completed", "one")
        assert (await http.post(f"/v1/responses/{queued['id']}/cancel")).json() == done
    assert not client.running


@pytest.mark.parametrize("method", ["cancel", "delete"])
async def test_a_response_in_the_background_is_cancelled(method: str) -> None:
    client = FakeClient()
    client.stall_after = 0
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        path = f"/v1/responses/{queued['id']}"
        later = await http.post("/v1/responses", json={**ASK, "previous_response_id": queued["id"]})
        assert "still in_progress" in later.json()["error"]["message"]
        assert len(client.running) == 1
        if method == "cancel":
            cancelled = (await http.post(f"{path}/cancel")).json()
            assert cancelled["status"] == "cancelled" == (await http.get(path)).json()["status"]
        else:
            await http.delete(path)
            assert (await http.get(path)).status_code == 404
    assert not client.running and client.aborted == 1


async def test_only_the_background_can_be_cancelled() -> None:
    async with in_process(FakeClient()) as http:
        answer = (await http.post("/v1/responses", json=ASK)).json()
        refused = await http.post(f"/v1/responses/{answer['id']}/cancel")
        assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
        assert (await http.post("/v1/responses/resp_none/cancel")).status_code == 404
        streamed = await http.get(f"/v1/responses/{answer['id']}", params={"stream": "true"})
        assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")


async def test_a_failure_in_the_background_is_stored() -> None:
    client = FakeClient()
    client.fail_after = 0
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        failed = await finished(http, queued["id"])
    Response.model_validate(failed)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")


@pytest.mark.parametrize("after", [0, 2])
async def test_a_failure_in_a_stream_is_an_event(after: int) -> None:
    client = FakeClient()
    client.fail_after = after
    _, events = await ask(client, stream=True, min_tokens=5)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "The engine failed.")
    assert [item["status"] for item in response["output"]] == ["incomplete"] * (after > 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_ends_has_failed(stream: bool, monkeypatch: Any) -> None:
    client = FakeClient()
    monkeypatch.setattr(client, "generate", lambda *_: [TextDelta([97], "a", "abort")])
    _, answer = await ask(client, stream=stream)
    response = answer[-1]["response"] if stream else answer
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")


async def test_a_long_conversation_is_read() -> None:
    client = FakeClient(max_model_len=1 << 16)
    items = [{"role": "user", "content": f"number {i}"} for i in range(200)]
    assert (await ask(client, input=items))[0] == 200 and "user: number 199\n" in prompt_of(client)
    status, answer = await ask(client, input=[*items, {"role": "user"}])
    assert status == 400 and "input[200]" in answer["error"]["message"]


async def test_a_failure_of_the_whole_is_an_error() -> None:
    client = FakeClient()
    client.fail_after = 1
    status, answer = await ask(client)
    assert status == 500 and answer["error"]["message"] == "The engine failed."


# ---- the store ----------------------------------------------------------------------------------------


def stored(text: str, parent: str | None = None) -> StoredResponse:
    response = {"id": "x", "status": "completed", "output": [{"id": "y", "text": text}]}
    return StoredResponse(json.dumps(response).encode(), json.dumps([text]).encode(), parent)


def test_the_store_is_bounded_by_bytes_and_the_least_recently_used_goes_first() -> None:
    size = stored("a").num_bytes
    store = ResponseStore(3 * size, 1 << 20)
    for name in "abc":
        store.put(name, stored(name))
    store.get("a")
    store.put("d", stored("d"))
    assert [name for name in "abcd" if name in store] == ["a", "c", "d"] and store.num_bytes == 3 * size
    store.put("d", stored("d"))
    assert len(store) == 3 and store.num_bytes == 3 * size
    store.put("e", stored("e" * 4 * size))
    assert "e" not in store and len(store) == 3
    for name in "acd":
        store.delete(name)
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_store_is_bounded_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.openai_compat.api.responses.store.MAX_RESPONSES", 2)
    store = ResponseStore(1 << 20, 1 << 20)
    for name in "abc":
        store.put(name, stored(name))
    assert [name for name in "abc" if name in store] == ["b", "c"]


def test_a_conversation_is_evicted_from_its_end() -> None:
    store = ResponseStore(4 * stored("a").num_bytes, 1 << 20)
    store.put("a", stored("a"))
    store.put("b", stored("b", "a"))
    store.put("c", stored("c", "b"))
    assert store.conversation("b") == ["a", {"id": "y", "text": "a"}, "b", {"id": "y", "text": "b"}]
    store.put("x", stored("x"))
    store.put("y", stored("y"))
    assert [name for name in "abcxy" if name in store] == ["a", "b", "x", "y"]
    store.delete("a")
    with pytest.raises(InvalidRequestError, match="or one before it"):
        store.conversation("b")


def test_the_turns_that_a_request_names_are_bounded() -> None:
    store = ResponseStore(1 << 20, 100)
    store.put("a", stored("a" * 20))
    store.put("b", stored("b" * 20, "a"))
    assert len(store.conversation("a")) == 2
    with pytest.raises(InvalidRequestError, match="more than 100 bytes") as caught:
        store.conversation("b")
    assert caught.value.param == "previous_response_id"


def test_items_that_a_request_names_are_read_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"id": "msg_x_0", "text": "a" * 60}
    response = {
        "id": "resp_x",
        "status": "completed",
        "output": [item, {"id": "msg_x_1"}],
        "instructions": "i",
    }
    store = ResponseStore(1 << 20, 500)
    store.put("resp_x", StoredResponse(json.dumps(response).encode(), b"[]", None))
    reads = []
    monkeypatch.setattr(
        store, "output_of", lambda name: reads.append(name) or ResponseStore.output_of(store, name)
    )
    references = References(store)
    first = references.find("msg_x_0")
    assert first == item and references.find("msg_x_0") is first, "a copy for each would multiply it"
    assert references.find("msg_x_2") is None and references.find("msg_y_0") is None
    assert references.find("no id") is None
    assert reads == ["resp_x", "resp_y"]
    with pytest.raises(InvalidRequestError, match="more than 500 bytes") as caught:
        for _ in range(10):
            references.find("msg_x_0")
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"a": "x" * 513}),
        ("metadata", {"x" * 513: "a"}),
        ("user", "x" * 513),
        ("safety_identifier", "x" * 513),
        ("prompt_cache_key", "x" * 513),
        ("tools", [{**FUNCTION, "unknown": "x" * (1 << 20)}]),
        ("text", {"format": {"type": "text", "unknown": "x" * (1 << 20)}}),
        ("tool_choice", {"type": "function", "name": "x" * (1 << 20)}),
    ],
)
async def test_what_a_response_repeats_is_bounded(field: str, value: Any) -> None:
    """It would be held, and in a stream written three times."""
    status, answer = await ask(**{field: value})
    assert status == 400 and field in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300


async def test_the_input_of_unfinished_responses_is_bounded() -> None:
    client = FakeClient()
    client.stall_after = 1
    item = {"role": "user", "content": "hi", "unknown": "x" * 10_000}
    async with in_process(client, max_response_store_bytes=1 << 14) as http:

        async def send(**more: Any) -> Any:
            return await http.post("/v1/responses", json={**ASK, "input": [item], "background": True, **more})

        first = await send()
        assert first.status_code == 200
        refused = await send()
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        small = await send(input="hi")
        assert small.status_code == 200, "what fits is served"
        for name in (first.json()["id"], small.json()["id"]):
            assert (await http.post(f"/v1/responses/{name}/cancel")).status_code == 200
        again = await send()
        assert again.status_code == 200
        assert (await http.post(f"/v1/responses/{again.json()['id']}/cancel")).status_code == 200
    assert not client.running


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
    with timed_callbacks(monkeypatch) as times:
        items = [cut_off, {"role": "user", "content": "hi"}]
        status, _ = await ask(FakeClient(max_model_len=1 << 20), input=items)
    assert status == 200 and max(times) < 0.05


# ---- the official SDK ---------------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[tuple[FakeClient, openai.OpenAI]]:
    client = FakeClient(max_model_len=1 << 16)
    with real_server(client, **HERMES) as port, sdk(openai.OpenAI, port) as api:
        yield client, api


def sdk(kind: Any, port: int) -> Any:
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=PATIENCE_S, max_retries=0)


class Point(pydantic.BaseModel):
    x: int
    y: int


def test_the_sdk_creates_reads_and_deletes(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ["one", "two", "three"]
    first = api.responses.create(**ASK)
    assert (first.output_text, first.status) == ("one", "completed") and first.usage is not None
    second = api.responses.create(**ASK, previous_response_id=first.id)
    assert second.output_text == "two" and "assistant: one" in prompt_of(client)
    assert api.responses.retrieve(second.id) == second
    (item,) = api.responses.input_items.list(second.id)
    assert item.type == "message" and item.content[0].text == "hi"  # type: ignore[union-attr]
    api.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError, match="web_search"):
        api.responses.create(**ASK, tools=[{"type": "web_search"}])
    queued = api.responses.create(**ASK, background=True)
    assert api.responses.cancel(queued.id).status in ("cancelled", "completed")


def test_the_sdk_parses(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ['{"x": 1, "y": 2}']
    parsed = api.responses.parse(**ASK, text_format=Point)
    assert parsed.output_parsed == Point(x=1, y=2)
    with api.responses.stream(**ASK, text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(x=1, y=2)


def test_the_sdk_streams(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ["one two", "one two"]
    with api.responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert (
        final.output_text
        == "one two"
        == "".join(event.delta for event in events if event.type == "response.output_text.delta")
    )
    raw = list(api.responses.create(**ASK, stream=True))
    assert [event.type for event in raw] == [event.type for event in events]


async def test_the_sdk_without_blocking() -> None:
    client = playing("one", "two", "three")
    with real_server(client) as port:
        async with sdk(openai.AsyncOpenAI, port) as api:
            first = await api.responses.create(**ASK)
            async with api.responses.stream(**ASK, previous_response_id=first.id) as stream:
                final = await stream.get_final_response()
            assert (first.output_text, final.output_text) == ("one", "two")
            queued = await api.responses.create(**ASK, background=True)
            await api.responses.cancel(queued.id)
            assert (await api.responses.retrieve(queued.id)).status in ("cancelled", "completed")
            await api.responses.delete(queued.id)


def test_blocks_are_free_when_the_client_leaves(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded, client.stall_after = ["one two"], 3
    for event in api.responses.create(**ASK, stream=True):
        if event.type == "response.output_text.delta":
            break
    else:
        raise AssertionError("no text came")
    api.close()
    eventually(lambda: not client.running)
    assert client.aborted == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_of_calls(scripted: tuple[FakeClient, openai.OpenAI], streamed: bool) -> None:
    client, api = scripted
    client.recorded = [called("get_weather", city="Bern"), "It rains in Bern."]

    def respond(**body: Any) -> Response:
        if not streamed:
            return api.responses.create(**{**ASK, **body}, tools=[FUNCTION])
        with api.responses.stream(**{**ASK, **body}, tools=[FUNCTION]) as stream:
            return stream.get_final_response()

    asked = respond(input="What is the weather?")
    (call,) = asked.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Bern"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answer = respond(input=[output], previous_response_id=asked.id)
    assert answer.output_text == "It rains in Bern." and "tool: rain" in prompt_of(client)
    # The same without the server's memory.
    client.recorded = ["It rains in Bern."]
    items = [{"role": "user", "content": "What is the weather?"}, call.model_dump(), output]
    assert respond(input=items, store=False).output_text == answer.output_text
