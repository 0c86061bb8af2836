"""Tools of a chat: what the template is shown, what may be called, and how calls come back."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import pytest
from chat_tools import ARGUMENTS, CALL, CHAT, HERMES, SECOND, TIME, TOOLS, WEATHER, ask, assembled

from microvllm.openai_compat.api import generation, parsing
from microvllm.openai_compat.api.answers import SCHEMAS
from microvllm.runtime.text.detokenizer import TextDelta


@pytest.mark.parametrize(
    ("output", "content", "names", "more"),
    [
        (CALL, None, ["get_weather"], {}),
        (f"Let me see.\n{CALL}\n{SECOND}", "Let me see.", ["get_weather", "get_time"], {}),
        (f"{CALL}\n{SECOND}", None, ["get_weather"], {"parallel_tool_calls": False}),
        ("It is sunny.", "It is sunny.", [], {}),
        (f"{CALL}", None, ["get_weather"], {"tool_choice": "auto"}),
    ],
)
async def test_calls_come_back_whole_and_streamed(
    output: str, content: str | None, names: list[str], more: dict[str, Any]
) -> None:
    status, answer, _ = await ask(output, tools=TOOLS, **more)
    choice = answer["choices"][0]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert (status, message["content"]) == (200, content)
    assert [call["function"]["name"] for call in calls] == names
    assert ("tool_calls" in message) == bool(names)  # left out when empty, as in vLLM
    assert len({call["id"] for call in calls}) == len(calls)
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    if names:
        assert json.loads(calls[0]["function"]["arguments"]) == ARGUMENTS
    _, chunks, _ = await ask(output, tools=TOOLS, stream=True, **more)
    streamed = assembled(chunks)
    assert streamed["role"] == "assistant" and streamed["finish_reason"] == choice["finish_reason"]
    assert streamed["content"] == (content or "")
    strip = [{**call, "id": ""} for call in calls]
    assert [{**call, "id": ""} for call in streamed.get("tool_calls", [])] == strip


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
async def test_long_outputs_are_read_in_a_worker_thread(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes up to 5 us for each character, and a long context has 500,000 of them."""
    threads: list[bool] = []
    read = parsing.ParsedChoice.feed

    def noting(self: parsing.ParsedChoice, delta: TextDelta) -> list[Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        return read(self, delta)

    monkeypatch.setattr(parsing.ParsedChoice, "feed", noting)
    body: dict[str, Any] = {
        CHAT: {"tools": TOOLS},
        "/v1/messages": {
            "max_tokens": 900,
            "tools": [{"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}],
        },
        "/v1/responses": {
            "input": "hi",
            "messages": None,
            "tools": [{"type": "function", **WEATHER["function"]}],
        },
    }[path]
    answers = []
    for limit in (len(CALL), len(CALL) - 1):
        monkeypatch.setattr(generation, "INLINE_CHARS", limit)
        status, answer, _ = await ask(CALL, path=path, **body)
        assert status == 200
        answers.append(
            re.sub(r'"(id|call_id|created_at|created|completed_at)": [^,}]*', "", json.dumps(answer))
        )
    assert answers[0] == answers[1] and "get_weather" in answers[0]
    assert threads == [True, False]


async def test_answers_are_as_the_document_says() -> None:
    output = f"Let me see.\n{CALL}\n{SECOND}"
    _, whole, _ = await ask(output, tools=TOOLS)
    _, chunks, _ = await ask(output, tools=TOOLS, stream=True)
    for name, parts in (("ChatCompletionResponse", [whole]), ("ChatCompletionStreamResponse", chunks)):
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
        for part in parts:
            jsonschema.validate(part, schema)


async def test_arguments_are_streamed_as_they_come() -> None:
    _, chunks, _ = await ask(CALL, tools=TOOLS, stream=True)
    pieces = [
        choice["delta"]["tool_calls"][0]["function"]["arguments"]
        for chunk in chunks
        for choice in chunk["choices"]
        if "tool_calls" in choice["delta"]
    ]
    assert len(pieces) > 10 and json.loads("".join(pieces)) == ARGUMENTS


async def test_every_choice_has_its_own_calls() -> None:
    outputs = [CALL, "No.", f"Hm.\n{SECOND}"]
    body = {"tools": TOOLS, "n": 3, "temperature": 1}
    _, whole, _ = await ask(outputs, **body)
    _, chunks, _ = await ask(outputs, stream=True, stream_options={"include_usage": True}, **body)
    reasons = []
    for index, choice in enumerate(whole["choices"]):
        streamed = assembled(chunks, index)
        named = [call["function"] for call in choice["message"].get("tool_calls", [])]
        assert [call["function"] for call in streamed.get("tool_calls", [])] == named
        assert streamed["content"] == (choice["message"]["content"] or "")
        reasons.append(choice["finish_reason"])
    assert reasons == ["tool_calls", "stop", "tool_calls"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_log_probabilities_cover_every_token() -> None:
    body = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    _, whole, _ = await ask(CALL, **body)
    _, chunks, _ = await ask(CALL, stream=True, **body)
    content = whole["choices"][0]["logprobs"]["content"]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [entry for part in parts for entry in (part["logprobs"] or {}).get("content", [])] == content
    assert len(content) == whole["usage"]["completion_tokens"]
    ids = [token for part in parts for token in part.get("token_ids") or []]
    assert ids == whole["choices"][0]["token_ids"]


async def test_a_cut_call_keeps_its_finish_reason() -> None:
    _, answer, _ = await ask(CALL, tools=TOOLS, max_tokens=60)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city')


async def test_stop_strings_end_a_call() -> None:
    _, answer, _ = await ask(f"{CALL}\n{SECOND}", tools=TOOLS, stop=["</tool_call>"])
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", "</tool_call>")
    assert len(choice["message"]["tool_calls"]) == 1
    _, answer, _ = await ask(CALL, tools=TOOLS, stop=["rich"])
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Zü'  # not made whole: the model has not ended it


async def test_without_tools_nothing_is_a_call() -> None:
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        _, answer, _ = await ask(CALL, **body)
        choice = answer["choices"][0]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (None, ["get_weather", "get_time"]),
        ("auto", ["get_weather", "get_time"]),
        ("none", ["get_weather", "get_time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "get_time"}}],
                },
            },
            ["get_time"],
        ),
    ],
)
async def test_what_the_template_is_shown(choice: Any, shown: list[str]) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "return_prompt_text": True}
    _, answer, _ = await ask("ok", **body)
    text = answer["prompt_text"]
    assert [name for name in ("get_weather", "get_time") if f"'name': '{name}'" in text] == shown


@pytest.mark.parametrize("outside", [True, False])
async def test_the_template_is_told_which_tools_to_hold_back(outside: bool) -> None:
    """Agents with many tools mark them, beside the function or in it, and templates leave them out."""
    tool = {**TIME, "defer_loading": True} if outside else TIME
    function = {**TIME["function"], **({} if outside else {"defer_loading": True})}
    body = {"tools": [WEATHER, {**tool, "function": function}], "return_prompt_text": True}
    _, answer, _ = await ask("ok", **body)
    weather, time = answer["prompt_text"].split("'name': 'get_time'")
    assert "'defer_loading': True" in time and "defer_loading" not in weather


NAMED = {"type": "function", "function": {"name": "get_weather"}}
ONLY_TIME = [{"type": "function", "function": {"name": "get_time"}}]


def allowed(mode: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": ONLY_TIME}}


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


@pytest.mark.parametrize(
    ("body", "field", "inside", "outside"),
    [
        ({"tool_choice": "required"}, "tool_choice", ["get_weather", "get_time"], []),
        ({"tool_choice": NAMED}, "tool_choice", ["get_weather"], ["get_time"]),
        ({"tool_choice": allowed("required")}, "tool_choice", ["get_time"], ["get_weather"]),
        ({"tool_choice": allowed("auto")}, None, [], []),
        ({"tool_choice": "auto"}, None, [], []),
        ({"tool_choice": "none"}, None, [], []),
        ({"tools": [strict(WEATHER), TIME]}, "tools", ["get_weather", "get_time"], []),
        ({"tools": [strict(WEATHER), TIME], "tool_choice": "none"}, None, [], []),
    ],
)
async def test_what_must_be_called_is_a_grammar(
    body: dict[str, Any], field: str | None, inside: list[str], outside: list[str]
) -> None:
    """So that a call is made, of an allowed function, with arguments that follow its schema."""
    status, answer, client = await ask(CALL, **{"tools": TOOLS, **body})
    form = client.submitted[0][1].structured_outputs
    assert status == 200 and (form is None) == (field is None)
    if form is not None:
        assert (form.kind, form.field, form.after, form.opens) == ("structural_tag", field, [], [])
        assert all(name in form.spec for name in inside) and not any(name in form.spec for name in outside)
        one = body.get("tool_choice") == NAMED
        assert ('"stop_after_first": true' in form.spec) == one
        reason = "stop" if one else "tool_calls"
        assert answer["choices"][0]["finish_reason"] == reason


async def test_one_call_where_several_are_not_wanted() -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    _, _, client = await ask(CALL, **body)
    form = client.submitted[0][1].structured_outputs
    assert form is not None and '"stop_after_first": true' in form.spec


async def test_a_schema_that_cannot_be_enforced_is_refused() -> None:
    endless = {"$ref": "http://example.com/schema"}
    for body in ({"tool_choice": "required"}, {"tools": [strict(tool("f", **endless))]}):
        status, answer, client = await ask("x", **{"tools": [tool("f", **endless)], **body})
        assert status == 400 and not client.submitted
        assert answer["error"]["param"] in ("tools", "tool_choice"), answer


async def test_beams_have_no_grammar() -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "use_beam_search": True}
    status, answer, client = await ask("x", **body)
    assert (status, answer["error"]["param"], client.submitted) == (400, "tool_choice", [])


async def test_render_and_tokenize_show_the_same_tools() -> None:
    _, answer, client = await ask("ok", tools=TOOLS)
    ids = client.submitted[0][0]
    _, rendered, _ = await ask("", path=f"{CHAT}/render", tools=TOOLS)
    _, tokenized, _ = await ask("", path="/tokenize", tools=TOOLS)
    assert rendered["token_ids"] == tokenized["tokens"] == ids
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("args", "changes", "said"),
    [
        ({}, {}, "tools: the chat template does not show tools"),
        (HERMES, {"messages": None, "prompt": "hi"}, "tools need messages"),
    ],
)
async def test_tokenize_ignores_no_tools(args: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    """A number of tokens without them would be too small for whoever means to send them."""
    status, answer, _ = await ask("", path="/tokenize", args=args, tools=TOOLS, **changes)
    assert status == 400 and answer["error"]["param"] == "tools" and said in answer["error"]["message"]


def tool(name: Any = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


ALLOWED = {"mode": "auto", "tools": [NAMED]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": []}, "tools: List should have at least 1 item"),
        ({"tools": [WEATHER] * 1025}, "tools: List should have at most 1024 items"),
        (
            {"tools": [WEATHER, {"type": "function"}]},
            "tools[1].function: Field required, an object with the name",
        ),
        ({"tools": [WEATHER, {"type": "web_search"}]}, "tools[1].type: Input should be 'function'"),
        ({"tools": [tool("")]}, "tools[0].function.name: Input should be 1 to 128 characters"),
        ({"tools": [tool("a b")]}, "tools[0].function.name: "),
        ({"tools": [tool('a"')]}, "tools[0].function.name: "),
        ({"tools": [tool("a\n")]}, "tools[0].function.name: "),
        ({"tools": [tool("a" * 129)]}, "tools[0].function.name: "),
        ({"tools": [tool(None)]}, "tools[0].function.name: Input should be a valid string"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name 'get_weather' is the name of another tool"),
        ({"tools": [tool(type="string")]}, "tools[0].function.parameters.type must be 'object'"),
        ({"tools": [tool(type="strnig")]}, "tools[0].function.parameters.type must be of array, boolean"),
        (
            {"tools": [tool(properties={"a": {"pattern": "("}})]},
            "tools[0].function.parameters.properties.a.pattern is no regular expression",
        ),
        (
            {"tools": [tool(properties={"a": {"pattern": 1}})]},
            "tools[0].function.parameters.properties.a.pattern must be a string",
        ),
        ({"tools": [tool(properties=[])]}, "tools[0].function.parameters.properties must be an object"),
        ({"tools": [tool(required="a")]}, "tools[0].function.parameters.required must be a list"),
        ({"tools": [tool(enum={})]}, "tools[0].function.parameters.enum must be a list"),
        ({"tools": [tool(anyOf={})]}, "tools[0].function.parameters.anyOf must be a list"),
        ({"tools": [tool(anyOf=[{}, 1])]}, "tools[0].function.parameters.anyOf[1] must be a JSON schema"),
        ({"tools": [tool(items={"type": ["string", 1]})]}, "tools[0].function.parameters.items.type must be"),
        ({"tools": [tool(**nested(80))]}, "tools[0].function.parameters.items.items"),
        ({"tool_choice": "auto"}, "When using `tool_choice`, `tools` must be set"),
        ({"tool_choice": NAMED}, "When using `tool_choice`, `tools` must be set"),
        ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice: Input should be one of 'auto', 'none'"),
        ({"tools": [TIME], "tool_choice": 1}, "tool_choice: "),
        ({"tools": [TIME], "tool_choice": []}, "tool_choice: "),
        ({"tools": [TIME], "tool_choice": {}}, "tool_choice.function must be set"),
        ({"tools": [TIME], "tool_choice": {"type": "custom"}}, "tool_choice: type: Input should be one of"),
        (
            {"tools": [TIME], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.allowed_tools must be set",
        ),
        (
            {"tools": [TIME], "tool_choice": NAMED},
            "The tool 'get_weather' that `tool_choice` names is not among",
        ),
        (
            {"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED}},
            "The tool 'get_weather' that `tool_choice` names is not among",
        ),
        (
            {"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [1]}}},
            "tool_choice: allowed_tools.tools[0]: Input should be a valid dictionary",
        ),
    ],
)
async def test_wrong_tools_are_named(body: dict[str, Any], message: str) -> None:
    status, answer, client = await ask("x", **body)
    error = answer["error"]
    assert (status, client.submitted) == (400, []), answer
    assert message in error["message"] and len(error["message"]) < 500
    assert error["param"].removeprefix("body.").split(".")[0] in ("tools", "tool_choice")


@pytest.mark.parametrize("pattern", [r"^\p{L}+$", r"(?<year>\d{4})", r"(?<=a+)b", "^[a-z]+$"])
async def test_patterns_of_javascript_are_taken(pattern: str) -> None:
    assert (await ask("x", tools=[tool(properties={"a": {"pattern": pattern}})]))[0] == 200


@pytest.mark.parametrize("name", ["f", "mcp__files-read.v2", "a/b:c", "天气", "a" * 128])
async def test_names_that_agents_use_are_taken(name: str) -> None:
    output = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
    status, answer, _ = await ask(output, tools=[tool(name)])
    assert status == 200
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == name


async def test_the_server_decides_about_auto() -> None:
    status, answer, _ = await ask("x", args={}, tools=TOOLS)
    assert status == 400 and answer["error"]["param"] == "tools"
    assert "--tool-call-parser" in answer["error"]["message"]
    assert (await ask("x", args={}, tools=TOOLS, tool_choice="none"))[0] == 200
    status, answer, _ = await ask("x", args={**HERMES, "enable_auto_tool_choice": False}, tools=TOOLS)
    assert status == 400 and answer["error"]["param"] == "tool_choice"
    assert "--enable-auto-tool-choice" in answer["error"]["message"]
