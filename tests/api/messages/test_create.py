"""Anthropic's Messages API: what becomes of a request, the blocks and events of a response, the errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_client import FakeClient, fresh
from http_tools import in_process
from messages_case import added_up, sse

from microvllm.openai_compat.api.messages.requests import CountTokensRequest, MessagesRequest
from microvllm.openai_compat.api.requests import honoured_fields
from microvllm.runtime.errors import EngineBusyError, EngineError

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: dict[str, Any] = {"max_tokens": 24, "messages": [{"role": "user", "content": "hi"}]}
# The fields of a message in the anthropic SDK 2.14, those of its beta among them (`betas`, `user_profile_id`
# and `workspace_id` are headers), what older versions had, and vLLM's.
SDK_FIELDS = """
    max_tokens messages model cache_control container diagnostics inference_geo metadata output_config
    service_tier speed stop_sequences system thinking tool_choice tools stream billing_policy compaction
    context_management fallback_credit_token fallbacks mcp_servers thread temperature top_p top_k
    output_format chat_template_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    watermarking mm_payload return_mm_kwargs
""".split()
ONLY_GENERATING = {"max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "cache_salt"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}


def result(**members: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", **members}


async def post(path: str = MESSAGES, client: FakeClient | None = None, **changes: Any) -> tuple[int, Any]:
    """Status and body of a request; the client shows the prompt as text."""
    async with in_process(client or FakeClient(max_model_len=4096)) as http:
        body = {name: value for name, value in {**HI, **changes}.items() if value is not ...}
        answer = await http.post(path, json=body)
    return answer.status_code, answer.json()


async def prompt_of(**changes: Any) -> str:
    """The text that the fake template makes of a request."""
    client = FakeClient(max_model_len=4096)
    status, answer = await post(client=client, **changes)
    assert status == 200, answer
    return bytes(client.submitted[0][0]).decode()


def test_every_field_of_the_sdk_has_a_state() -> None:
    for kind, known in (
        (MessagesRequest, set(SDK_FIELDS)),
        (CountTokensRequest, set(SDK_FIELDS) - ONLY_GENERATING),
    ):
        states = [*honoured_fields(kind), *kind.ignored, *kind.refused]
        assert sorted(states) == sorted(known)


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize("name", MessagesRequest.ignored)
async def test_an_ignored_field_changes_nothing(path: str, name: str) -> None:
    plain, given = await post(path, temperature=0), await post(path, temperature=0, **{name: {"x": [1]}})
    for answer in (plain, given):
        answer[1].pop("id", None)
    assert plain == given and plain[0] == 200


@pytest.mark.parametrize("name", MessagesRequest.refused)
async def test_a_refused_field_is_named(name: str) -> None:
    status, answer = await post(**{name: {"type": "x"}})
    assert status == 400 and name in answer["error"]["message"]
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    # By these details the SDK's tool runner knows that it has to send the whole conversation with each turn.
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert answer["error"].get("details") == (details if name == "thread" else None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences must be texts"),
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]: Object missing required field `content`"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0]: Blocks of type 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [result(content=[IMAGE])]}]},
            "messages[0].content[0].content[0]: Blocks of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "content[0].text"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "tool_use blocks"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [USE]}]},
            "messages[1]",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "messages[1]",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [result()]}]},
            "tool_result",
        ),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "name": "a<b"}]}, "tools[0].name: Input should be 1 to 128 characters"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "maybe"}}, "tool_choice"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "budget_tokens"),
        ({"output_config": {"effort": "huge"}}, "effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "format"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}},
            "output_config.format",
        ),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "clear_tool_uses_20250919",
        ),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": 0}]}},
            "edits[0].keep",
        ),
        ({"temperature": 3}, "temperature"),
        ({"stream": "perhaps"}, "stream"),
    ],
)
async def test_what_is_wrong_is_named(changes: dict[str, Any], named: str) -> None:
    status, answer = await post(**changes)
    assert status == 400 and named in answer["error"]["message"], answer
    assert set(answer) == {"type", "error"} and set(answer["error"]) == {"type", "message"}


class TestPrompt:
    async def test_system(self) -> None:
        blocks = [
            {"type": "text", "text": "x-anthropic-billing-header: cch=123;"},
            {"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Two"},
        ]
        assert await prompt_of(system=blocks) == await prompt_of(system="One\nTwo")
        assert await prompt_of(system="x-anthropic-billing-header: 1\nOne") == await prompt_of(system="One")
        assert (await prompt_of(system="One")).startswith("system: One\nuser: hi\nassistant: ")

    async def test_a_later_system_message_stays_where_it_is(self) -> None:
        turns = [*HI["messages"], {"role": "system", "content": "Be brief."}]
        reminder = "<system-reminder>\nBe brief.\n</system-reminder>"
        assert await prompt_of(messages=turns) == f"user: hi\n{reminder}\nassistant: "
        assert await prompt_of(messages=turns[::-1]) == "system: Be brief.\nuser: hi\nassistant: "

    async def test_a_system_message_may_end_with_the_turn(self) -> None:
        note = {"role": "system", "content": "9 tokens left", "clear_at": "next_user_message"}
        turns = [*HI["messages"], note]
        assert "9 tokens left" in await prompt_of(messages=turns)
        assert "9 tokens left" not in await prompt_of(messages=[*turns, *HI["messages"]])

    async def test_turns_of_one_role_are_joined(self) -> None:
        user, other = (
            {"role": "user", "content": "a"},
            {"role": "ctx", "content": [{"type": "text", "text": "b"}]},
        )
        said = {"role": "assistant", "content": [{"type": "text", "text": "c"}]}
        prompt = await prompt_of(messages=[user, other, said, said, user])
        assert prompt == "user: a\nb\nassistant: cc\nuser: a\nassistant: "

    async def test_the_last_message_of_the_assistant_is_continued(self) -> None:
        turns = [*HI["messages"], {"role": "assistant", "content": "Well, "}]
        assert await prompt_of(messages=turns) == "user: hi\nassistant: Well, "

    @pytest.mark.parametrize(
        ("given", "shown"),
        [
            ({"content": "42"}, "42"),
            ({}, ""),
            ({"content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}, "4\n2"),
            ({"content": "no such file", "is_error": True}, "Error: no such file"),
            ({"content": "error 5", "is_error": True}, "error 5"),
        ],
    )
    async def test_results_of_tools(self, given: dict[str, Any], shown: str) -> None:
        client = FakeClient(max_model_len=4096)
        seen: list[Any] = []
        client.processor.render_text = lambda messages, **_: seen.extend(messages) or "x"  # type: ignore[method-assign,func-returns-value]
        thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
        turns = [
            *HI["messages"],
            {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, USE]},
            {"role": "user", "content": [result(**given), {"type": "text", "text": "and?"}]},
        ]
        status, answer = await post(client=client, messages=turns)
        assert status == 200, answer
        assert seen[1:] == [
            {
                "role": "assistant",
                "content": "",
                "reasoning": "Hm.",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "t1"}
                ],
            },
            {"role": "tool", "content": shown, "name": "f", "tool_call_id": "t1"},
            {"role": "user", "content": [{"type": "text", "text": "and?"}]},
        ]

    @pytest.mark.parametrize(
        ("keep", "kept"), [("all", "ab"), ({"type": "thinking_turns", "value": 1}, "b"), (None, "b")]
    )
    async def test_reasoning_of_earlier_turns_can_be_cleared(self, keep: Any, kept: str) -> None:
        client = FakeClient(max_model_len=4096)
        seen: list[Any] = []
        client.processor.render_text = lambda messages, **_: seen.extend(messages) or "x"  # type: ignore[method-assign,func-returns-value]
        turns = [*HI["messages"]]
        for word in "ab":
            thought = {"type": "thinking", "thinking": word, "signature": ""}
            turns += [
                {"role": "assistant", "content": [thought, {"type": "text", "text": "so"}]},
                *HI["messages"],
            ]
        edit = {"type": "clear_thinking_20251015", **({} if keep is None else {"keep": keep})}
        await post(client=client, messages=turns, context_management={"edits": [edit]})
        assert "".join(message.get("reasoning", "") for message in seen) == kept

    async def test_thinking_and_effort_reach_the_template(self) -> None:
        for kind, value in (("adaptive", True), ("enabled", True), ("disabled", False)):
            assert f"enable_thinking={value};" in await prompt_of(thinking={"type": kind})
        assert "enable_thinking" not in await prompt_of()
        prompt = await prompt_of(output_config={"effort": "high"}, thinking={"type": "disabled"})
        assert "reasoning_effort=high;" in prompt and "enable_thinking=False;" in prompt

    async def test_messages_change_the_tools(self) -> None:
        def named(name: str, **more: Any) -> dict[str, Any]:
            return {**TOOL, "name": name, **more}

        def change(kind: str, name: str) -> dict[str, Any]:
            return {"type": kind, "tool": {"type": "tool_reference", "name": name}}

        async def offered(*turns: dict[str, Any]) -> list[str]:
            client = FakeClient(max_model_len=4096)
            seen: list[Any] = []
            client.processor.render_text = lambda _, tools, **__: seen.extend(tools) or "x"  # type: ignore[method-assign,func-returns-value]
            tools = [named("a"), named("b", defer_loading=True), named("c", defer_loading=True)]
            async with in_process(client, **PARSED) as http:
                body = {**HI, "tools": tools, "messages": [*HI["messages"], *turns]}
                answer = await http.post(MESSAGES, json=body)
            assert answer.status_code == 200, answer.text
            return [tool["function"]["name"] for tool in seen]

        found = result(content=[{"type": "tool_reference", "tool_name": "c"}])
        searched = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [found]}]
        assert await offered() == ["a"]
        assert await offered(*searched) == ["a", "c"]
        definition = {"type": "tool_definition", "definition": named("d")}
        changes = [
            {"type": "text", "text": "Other tools."},
            change("tool_removal", "a"),
            change("tool_addition", "b"),
            {"type": "tool_addition", "tool": definition},
        ]
        assert await offered({"role": "system", "content": changes}) == ["b", "d"]
        status, answer = await post(
            messages=[*HI["messages"], {"role": "system", "content": [change("tool_addition", "z")]}]
        )
        assert status == 400 and "messages[1].content[0]" in answer["error"]["message"]

    async def test_effort_of_a_message(self) -> None:
        turns = [*HI["messages"], {"role": "system", "content": "x", "output_config": {"effort": "low"}}]
        prompt = await prompt_of(messages=turns, output_config={"effort": "high"})
        assert "reasoning_effort=low;" in prompt

    @pytest.mark.parametrize("older", [False, True])
    async def test_a_schema_reaches_the_sampler(self, older: bool) -> None:
        client = FakeClient(max_model_len=4096)
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        wanted = {"type": "json_schema", "schema": schema}
        await post(
            client=client, **({"output_format": wanted} if older else {"output_config": {"format": wanted}})
        )
        found = client.submitted[0][1].structured_outputs
        assert found is not None and found.kind == "json" and json.loads(found.spec) == schema

    async def test_sampling(self) -> None:
        client = FakeClient()
        await post(
            *(MESSAGES, client),
            **{"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["zzz"]},
            **{"max_tokens": 32_000, "cache_salt": "tenant"},
        )
        params = client.submitted[0][1]
        assert client.submitted[0][3] == "tenant"
        assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.9, 3, ["zzz"])
        assert params.max_tokens == client.config.max_model_len  # a bound that no response reaches


# ---- responses ----------------------------------------------------------------------------------------


async def test_whole_and_streamed() -> None:
    status, whole = await post(temperature=0, stop_sequences=["zzzz"])
    assert status == 200 and whole["id"].startswith("msg") and whole["role"] == "assistant"
    (block,) = whole["content"]
    async with in_process(FakeClient(max_model_len=4096)) as http:
        answer = await http.post(
            MESSAGES, json={**HI, "temperature": 0, "stop_sequences": ["zzzz"], "stream": True}
        )
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse(answer.text)
    names = [name for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start, delta = events[0][1]["message"], events[-2][1]
    assert start == {**whole, "id": start["id"], "content": [], "stop_reason": None, "usage": start["usage"]}
    assert start["usage"] == {**whole["usage"], "output_tokens": 0} and delta["usage"] == whole["usage"]
    assert delta["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert (
        "".join(event["delta"]["text"] for name, event in events if name == "content_block_delta")
        == block["text"]
    )


@pytest.mark.parametrize(
    ("changes", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "max_tokens", None),
        ({"max_tokens": 200, "stop_sequences": ["x", "j"]}, "stop_sequence", "any"),
        ({"max_tokens": 4000}, "end_turn", None),
    ],
)
async def test_why_it_stopped(changes: dict[str, Any], reason: str, sequence: str | None) -> None:
    _, answer = await post(temperature=0, **changes)
    assert answer["stop_reason"] == reason
    assert answer["stop_sequence"] in (changes["stop_sequences"] if sequence else [None])


async def test_a_full_context_is_not_taken_for_the_limit_of_the_request() -> None:
    client = FakeClient(max_model_len=60)
    client.recorded = ["x" * 100]
    _, answer = await post(client=client, max_tokens=32_000)
    assert answer["stop_reason"] == "model_context_window_exceeded"
    _, answer = await post(client=client, max_tokens=20)
    assert answer["stop_reason"] == "max_tokens"


async def test_tokens_of_the_prompt_are_counted_once() -> None:
    client = FakeClient(max_model_len=4096)
    _, count = await post(COUNT, client=client)
    assert not client.submitted
    _, answer = await post(client=client)
    usage = answer["usage"]
    assert count == {"input_tokens": usage["input_tokens"]} == {"input_tokens": len(client.submitted[0][0])}
    stream = type(client).submit_all

    async def cached(self: Any, *args: Any, **options: Any) -> Any:
        streams = await stream(self, *args, **options)
        streams[0].num_cached_tokens = 5
        return streams

    client.submit_all = cached.__get__(client)  # type: ignore[method-assign]
    _, answer = await post(client=client)
    assert answer["usage"]["cache_read_input_tokens"] == 5
    assert answer["usage"]["input_tokens"] == usage["input_tokens"] - 5


SAID = (
    "<think>\nLet me look.\n</think>\n\nI ask.\n<tool_call>\n"
    '{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
    '{"name": "f", "arguments": {}}\n</tool_call>'
)
PARSED: dict[str, Any] = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}


class TestCalls:
    """Messages of a model that reasons and calls tools, whole and streamed."""

    @staticmethod
    async def read(**changes: Any) -> tuple[dict[str, Any], FakeClient]:
        """The whole message, of which the streamed one must have the same blocks and counts."""
        client = FakeClient(max_model_len=4096)
        client.recorded = [SAID, SAID]
        body = {**HI, "max_tokens": 400, "tools": [TOOL], **changes}
        async with in_process(client, **PARSED) as http:
            whole = (await http.post(MESSAGES, json=body)).json()
            streamed = sse((await http.post(MESSAGES, json={**body, "stream": True})).text)
        last = streamed[-2][1]
        assert last["usage"] == whole["usage"] and last["delta"]["stop_reason"] == whole["stop_reason"]
        found = [
            {**block, "signature": ""} if "signature" in block else block for block in added_up(streamed)
        ]
        ids = [block.pop("id") for block in (*whole["content"], *found) if block["type"] == "tool_use"]
        assert len(set(ids)) == len(ids) and all(ids)
        plain = [{**block, "signature": ""} if "signature" in block else block for block in whole["content"]]
        assert found == plain
        return whole, client

    async def test_reasoning_text_and_calls(self) -> None:
        whole, client = await self.read()
        assert whole["content"] == [
            {"type": "thinking", "thinking": "Let me look.", "signature": whole["id"]},
            {"type": "text", "text": "I ask."},
            {"type": "tool_use", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "name": "f", "input": {}},
        ]
        assert whole["stop_reason"] == "tool_use"
        assert (
            0 < whole["usage"]["output_tokens_details"]["thinking_tokens"] < whole["usage"]["output_tokens"]
        )
        function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}
        prompt = bytes(client.submitted[0][0]).decode()
        assert f"tools={[{'type': 'function', 'function': function}]}" in prompt

    async def test_what_the_request_leaves_out(self) -> None:
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        whole, _ = await self.read(thinking={"type": "enabled", "display": "omitted"}, tool_choice=choice)
        assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
        whole, _ = await self.read(tool_choice={"type": "none"})
        assert [block["type"] for block in whole["content"]] == ["thinking", "text"]
        assert whole["stop_reason"] == "end_turn" and "<tool_call>" in whole["content"][1]["text"]

    async def test_a_call_that_is_cut_off(self) -> None:
        whole, _ = await self.read(max_tokens=SAID.index('": 1}}') + 2)
        assert whole["content"][-1]["type"] == "tool_use" and whole["stop_reason"] == "max_tokens"

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"tools": [{**TOOL, "input_schema": {"type": "nonsense"}}]}, "tools[0].input_schema.type"),
            ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ],
    )
    async def test_errors_of_the_chat_have_the_names_of_this_api(
        self, changes: dict[str, Any], named: str
    ) -> None:
        async with in_process(FakeClient(max_model_len=4096), **PARSED) as http:
            answer = await http.post(MESSAGES, json={**HI, **changes})
        assert answer.status_code == 400 and named in answer.json()["error"]["message"]

    async def test_a_budget_needs_a_parser(self) -> None:
        status, answer = await post(thinking={"type": "enabled", "budget_tokens": 5})
        assert status == 400 and "thinking.budget_tokens" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "kind", "said"),
    [
        ({"model": "other"}, 404, "not_found_error", "`other` does not exist"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            400,
            "invalid_request_error",
            "prompt is too long: ",
        ),
    ],
)
async def test_errors(changes: dict[str, Any], status: int, kind: str, said: str) -> None:
    found, answer = await post(**changes)
    assert found == status and answer["error"]["type"] == kind and said in answer["error"]["message"]


async def test_errors_of_every_layer_have_one_form() -> None:
    busy, failing = FakeClient(), fresh(fail_after=0)

    def full() -> None:
        raise EngineBusyError("The queue is full.", 7)

    busy.check_room = full  # type: ignore[method-assign]
    failing.failure = EngineError("The engine failed.")
    found = []
    for client, args, method, path, headers in (
        (FakeClient(), {"api_keys": ("k",)}, "POST", MESSAGES, {}),
        (FakeClient(), {"allowed_hosts": None}, "POST", MESSAGES, {"host": "elsewhere.example"}),
        (FakeClient(), {}, "POST", MESSAGES + "/batches", {}),
        (FakeClient(), {}, "GET", MESSAGES, {}),
        (FakeClient(), {"max_body_bytes": 10}, "POST", MESSAGES, {}),
        (busy, {}, "POST", MESSAGES, {}),
        (failing, {}, "POST", MESSAGES, {}),
    ):
        async with in_process(client, **args) as http:
            answer = await http.request(method, path, json=HI, headers=headers)
        assert answer.json().keys() == {"type", "error"} and answer.json()["type"] == "error"
        assert answer.json()["error"].keys() == {"type", "message"}
        found.append((answer.status_code, answer.json()["error"]["type"]))
    assert found == [
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (503, "overloaded_error"),
        (500, "api_error"),
    ]


async def test_an_error_within_a_stream_is_its_last_event() -> None:
    async with in_process(fresh(fail_after=2)) as http:
        answer = await http.post(MESSAGES, json={**HI, "stream": True})
    events = sse(answer.text)
    assert answer.status_code == 200 and events[0][0] == "message_start"
    assert events[-1][1] == {"type": "error", "error": {"type": "api_error", "message": "The engine failed."}}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-api-key", "k")], 200),
        ([("x-api-key", "wrong")], 401),
        ([("x-api-key", "k"), ("authorization", "Bearer other")], 200),
        ([("x-api-key", "other"), ("authorization", "Bearer k")], 200),
        ([("x-api-key", "k"), ("x-api-key", "k")], 401),
        ([("x-api-key", "")], 401),
        ([], 401),
    ],
)
async def test_the_key_may_be_in_anthropics_header(headers: list[tuple[str, str]], status: int) -> None:
    async with in_process(FakeClient(), api_keys=("k",)) as http:
        for method, path in (("POST", MESSAGES), ("GET", "/v1/models")):
            answer = await http.request(method, path, json=HI, headers=headers)
            assert answer.status_code == status
