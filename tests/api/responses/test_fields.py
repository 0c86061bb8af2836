"""/v1/responses: every field and type of the SDK is honoured, ignored or refused by name."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from chat_tools import WEATHER
from fake_client import FakeClient
from http_tools import in_process
from openai.types.responses import ResponseInputItemParam, ToolParam
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from responses_case import ASK, CUSTOM, ask, events_of

from microvllm.openai_compat.api.requests import GenerationRequest, honoured_fields
from microvllm.openai_compat.api.responses.items import PREFIXES
from microvllm.openai_compat.api.responses.requests import ResponsesRequest

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


async def test_what_has_another_name_here_is_named() -> None:
    """Requests are rewritten from those of chats."""
    async with in_process(FakeClient()) as http:
        for name, here in ResponsesRequest.renamed.items():
            answer = await http.post("/v1/responses", json={**ASK, name: 5})
            assert f" {name} is `{here}` here." in answer.json()["error"]["message"]
        answer = await http.post("/v1/responses", json={**ASK, "tools": [WEATHER]})
        assert answer.json()["error"]["message"].startswith("tools[0].function: is the form of chats")


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
