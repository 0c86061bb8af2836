"""Honour or refuse: every field that OpenAI or vLLM defines is walked, and every kind of wrong value."""

from __future__ import annotations

from typing import Any

import pytest
from fake_client import EOS, FakeClient
from http_tools import events, in_process

from microvllm.openai_compat.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    honoured_fields,
)

# The fields of the OpenAI reference and of vLLM 0.33's request models, for both endpoints or for one.
COMMON_FIELDS = """
    model max_tokens temperature top_p n stream stream_options stop presence_penalty frequency_penalty
    logit_bias seed logprobs top_logprobs echo user response_format service_tier store metadata best_of
    top_k min_p repetition_penalty length_penalty use_beam_search stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
    truncation_side allowed_token_ids bad_words prompt_logprobs logprob_token_ids structured_outputs
    add_special_tokens thinking_token_budget priority request_id session_id return_tokens_as_token_ids
    return_token_ids cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    stream_interval watermarking return_weight_versions routed_experts_prompt_start return_token_offsets
    mm_payload return_mm_kwargs media_io_kwargs mm_processor_kwargs guided_json guided_regex guided_choice
    guided_grammar guided_whitespace_pattern logits_processors safety_identifier prompt_cache_key
    prompt_cache_retention structural_tag guided_decoding_backend
""".split()
COMPLETION_FIELDS = "prompt suffix prompt_embeds".split()
CHAT_FIELDS = """
    messages max_completion_tokens tools tool_choice parallel_tool_calls reasoning_effort
    modalities add_generation_prompt continue_final_message chat_template chat_template_kwargs documents
    include_reasoning return_prompt_text functions function_call audio prediction verbosity web_search_options
    moderation prompt_cache_options
""".split()

# A value that asks for something, for every field that is refused.
DEMANDING: dict[str, Any] = {
    "top_logprobs": 3,
    "best_of": 2,
    "logits_processors": ["x"],
    "thinking_token_budget": 5,
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "structural_tag": "{}",
    "suffix": "x",
    "prompt_embeds": "AAAA",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["audio"],
    "audio": {"voice": "x"},
    "web_search_options": {},
    "moderation": {"model": "m"},
    "prompt_cache_options": {"mode": "explicit"},
    "documents": [{"text": "x"}],
    "chat_template": "{{ messages }}",
}

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
# For every honoured field: a base body, and a change to it that has to be seen in the answer or the engine.
BASE = {"max_tokens": 24, "seed": 1, "ignore_eos": True}
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "max_tokens": ({}, 3),
    "max_completion_tokens": ({}, 3),
    "temperature": ({}, 0.5),
    "top_p": ({}, 0.5),
    "top_k": ({}, 5),
    "min_p": ({}, 0.1),
    "n": ({}, 2),
    "seed": ({}, 2),
    "stop": ({}, ["a", "e", "i", "o"]),
    "stop_token_ids": ({}, [*range(ord("a"), ord("p"))]),
    "ignore_eos": ({"max_tokens": 200, "ignore_eos": False}, True),
    "min_tokens": ({"max_tokens": 200, "ignore_eos": False}, 150),
    "include_stop_str_in_output": ({"stop": ["a", "e", "i", "o"]}, True),
    "skip_special_tokens": ({"max_tokens": 200}, False),
    "stream": ({}, True),
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "echo": ({}, True),
    "return_token_ids": ({}, True),
    "cache_salt": ({}, "tenant"),
    "priority": ({}, 3),
    "request_id": ({}, "mine"),
    "prompt": ({}, "other"),
    "add_special_tokens": ({}, None),
    "messages": ({}, [{"role": "user", "content": "other"}]),
    "add_generation_prompt": ({}, False),
    "continue_final_message": ({}, True),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "presence_penalty": ({}, 0.5),
    "frequency_penalty": ({}, -1),
    "repetition_penalty": ({}, 1.1),
    "logit_bias": ({}, {"5": 10}),
    "allowed_token_ids": ({}, [120, 121]),
    "bad_words": ({}, ["x"]),
    "repetition_detection": (
        {"max_tokens": 200},
        {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2},
    ),
    "truncate_prompt_tokens": ({}, 1),
    "truncation_side": ({"truncate_prompt_tokens": 1, "return_token_ids": True}, "right"),
    "spaces_between_special_tokens": ({}, False),
    "stream_interval": ({"stream": True}, 4),
    "logprobs": ({}, 1),
    "top_logprobs": ({"logprobs": True}, 3),
    "prompt_logprobs": ({}, 1),
    "logprob_token_ids": ({"logprobs": True}, [1, 2]),
    "return_tokens_as_token_ids": ({"logprobs": True}, True),
    "reasoning_effort": ({}, "low"),
    "use_beam_search": ({}, True),
    "length_penalty": ({"use_beam_search": True, "n": 3, "stop_token_ids": [*range(128)]}, -10),
    "return_prompt_text": ({}, True),
    "tools": ({"tool_choice": "none"}, [TOOL]),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "none"}, "auto"),
    "parallel_tool_calls": ({"tools": [TOOL]}, False),
    "include_reasoning": ({}, False),
    "thinking_token_budget": ({}, 3),
}
CHANGES |= {
    "response_format": ({}, {"type": "json_object"}),
    "structured_outputs": ({}, {"regex": "[ab]+"}),
    "guided_json": ({}, {"type": "integer"}),
    "guided_regex": ({}, "[ab]+"),
    "guided_choice": ({}, ["a", "b"]),
    "guided_grammar": ({}, 'root ::= "a"'),
    "guided_whitespace_pattern": ({"guided_json": {}}, " "),
}
PATHS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest}
SUBJECTS = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}],
    },
}


HONOURED = [(path, name) for path, kind in PATHS.items() for name in honoured_fields(kind)]
IGNORED = [(path, name) for path, kind in PATHS.items() for name in kind.ignored]
REFUSED = [(path, name) for path, kind in PATHS.items() for name in kind.refused]


# What the model says to see these fields: it reasons, and calls twice.
RECORDED = "<think>hm</think>" + '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
WITH_RECORDED = ("tool_choice", "parallel_tool_calls", "include_reasoning")


async def ask(path: str, /, *, recorded: str = "", **body: Any) -> tuple[int, Any, list[Any]]:
    """Status, answer without its id and time, and what reached the engine."""
    client = FakeClient()
    client.recorded = [recorded] if recorded else []
    async with in_process(client, tool_call_parser="hermes", reasoning_parser="qwen3") as http:
        answer = await http.post(path, json={**SUBJECTS[path], **body})
    parsed = events(answer.text) if body.get("stream") and answer.status_code == 200 else [answer.json()]
    for part in parsed:
        part.pop("created", None)
        if "request_id" not in body:
            part.pop("id", None)
    return answer.status_code, parsed, client.submitted


def test_every_known_field_has_a_row() -> None:
    for (path, kind), own in zip(PATHS.items(), (COMPLETION_FIELDS, CHAT_FIELDS), strict=True):
        known = [*honoured_fields(kind), *kind.ignored, *kind.refused]
        assert sorted(known) == sorted(COMMON_FIELDS + own), path


@pytest.mark.parametrize(("path", "name"), HONOURED)
async def test_an_honoured_field_changes_something(path: str, name: str) -> None:
    if name == "model":
        assert (await ask(path, model="fake-model"))[0] == 200
        assert (await ask(path, model="other"))[0] == 404
        return
    context, value = CHANGES[name]
    if name == "spaces_between_special_tokens":
        return  # not with this tokenizer: see test_openai_options.py
    if "completions" in path and "chat" not in path and context.get("logprobs"):
        context = {**context, "logprobs": 1}  # a number there
    if name == "add_special_tokens":
        value = path != "/v1/completions"
    if name == "echo" and "chat" in path:
        context = {"add_generation_prompt": False}
    base = {**BASE, **context}
    if name in WITH_RECORDED:
        base |= {"recorded": RECORDED, "max_tokens": 200}
    without, changed = await ask(path, **base), await ask(path, **{**base, name: value})
    assert (without[0], changed[0]) == (200, 200)
    assert changed[1:] != without[1:]
    if name not in ("priority", "cache_salt"):  # those two are the engine's business
        assert changed[1] != without[1]


@pytest.mark.parametrize(("path", "name"), IGNORED)
async def test_a_field_ignored_on_purpose_changes_nothing(path: str, name: str) -> None:
    assert await ask(path, **BASE, **{name: ["anything", {"at": "all"}]}) == await ask(path, **BASE)


@pytest.mark.parametrize(("path", "name"), REFUSED)
async def test_a_refused_field_is_named(path: str, name: str) -> None:
    status, answer, submitted = await ask(path, **{name: DEMANDING[name]})
    assert status == 400 and not submitted
    error = answer[0]["error"]
    assert (error["param"], error["type"], error["code"]) == (name, "BadRequestError", 400)
    assert name in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("documents", []),
        ("functions", []),
        ("guided_choice", []),
        ("guided_grammar", ""),
        ("guided_regex", ""),
        ("kv_transfer_params", {}),
        ("ec_transfer_params", {}),
    ],
)
async def test_an_empty_wish_asks_for_nothing(name: str, value: Any) -> None:
    path = "/v1/chat/completions"
    assert await ask(path, **BASE, **{name: value}) == await ask(path, **BASE)


@pytest.mark.parametrize(("path", "name"), REFUSED)
async def test_a_refused_field_may_ask_for_nothing(path: str, name: str) -> None:
    plain = await ask(path, **BASE)
    for value in (None, *PATHS[path].refused[name]):
        assert await ask(path, **BASE, **{name: value}) == plain


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"functions": [{"name": "f"}]}, ["functions"]),
        (
            {"best_of": 2, "logits_processors": [1], "audio": {"voice": "x"}, "tools": [TOOL]},
            ["audio", "best_of", "logits_processors"],
        ),
        (
            {"logits_processors": [1], "prompt_embeds": "x", "documents": ["x"]},
            ["documents", "logits_processors"],
        ),
    ],
)
async def test_all_refused_fields_are_named_and_the_main_one_first(
    body: dict[str, Any], named: list[str]
) -> None:
    status, answer, submitted = await ask("/v1/chat/completions", **body)
    error = answer[0]["error"]
    assert (status, error["param"], submitted) == (400, named[0], [])
    assert error["message"].startswith(", ".join(named) + (" is " if len(named) == 1 else " are "))
    assert "docs/http.md" in error["message"]


@pytest.mark.parametrize(
    ("tools", "shown"),
    [
        ([TOOL], [TOOL]),
        (
            [{"function": {"name": "f", "extra": 1, "strict": None}, "more": 2}],
            [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}],
        ),
        (
            [{"type": "function", "function": {"strict": True, "parameters": {"a": [1]}, "name": "g"}}],
            [
                {
                    "type": "function",
                    "function": {"name": "g", "description": None, "parameters": {"a": [1]}, "strict": True},
                }
            ],
        ),
    ],
)
async def test_tools_that_may_not_be_called_are_shown_to_the_template(tools: Any, shown: Any) -> None:
    body = {"tools": tools, "tool_choice": "none", "parallel_tool_calls": True}
    _, answer, _ = await ask("/v1/chat/completions", **BASE, **body, return_prompt_text=True)
    assert answer[0]["prompt_text"].endswith(f"tools={shown};")
    # The fake template has no text that could be seen to show tools, so a format of calls is named.
    async with in_process(FakeClient(), tool_call_parser="hermes") as http:
        count = await http.post("/tokenize", json={**SUBJECTS["/v1/chat/completions"], "tools": tools})
    assert count.json()["count"] == answer[0]["usage"]["prompt_tokens"]


async def test_the_server_may_keep_tools_from_the_template() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "return_prompt_text": True}
    async with in_process(FakeClient(), exclude_tools_when_tool_choice_none=True) as http:
        plain = await http.post("/v1/chat/completions", json=body)
        tools = await http.post("/v1/chat/completions", json={**body, "tools": [TOOL], "tool_choice": "none"})
    assert tools.json()["prompt_text"] == plain.json()["prompt_text"]


@pytest.mark.parametrize(
    "tools",
    [
        [],
        {},
        ["f"],
        [{}],
        [{"function": {}}],
        [{"function": {"name": ""}}],
        [{"function": {"name": 1}}],
        [{"type": "web_search", "function": {"name": "f"}}],
        [{"function": {"name": "f", "parameters": []}}],
        [TOOL] * 2000,
    ],
)
async def test_malformed_tools(tools: Any) -> None:
    status, answer, submitted = await ask("/v1/chat/completions", tools=tools, tool_choice="none")
    error = answer[0]["error"]
    assert (status, error["param"], error["type"]) == (400, "body.tools", "Bad Request") and not submitted


async def test_unknown_fields_are_ignored() -> None:
    body = {"conversation_id": "x", "whatever": [1, {"a": None}]}
    assert await ask("/v1/completions", **BASE, **body) == await ask("/v1/completions", **BASE)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.01, "temperature"),
        ("temperature", 1e308, "temperature"),
        ("temperature", "hot", "body.temperature"),
        ("temperature", True, "body.temperature"),
        ("temperature", [1], "body.temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.5, "top_p"),
        ("top_k", -2, "top_k"),
        ("top_k", 1.5, "body.top_k"),
        ("min_p", -0.1, "min_p"),
        ("min_p", 1.1, "min_p"),
        ("n", 0, "n"),
        ("n", 10**9, "n"),
        ("n", 2**70, "body.n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 257, "max_tokens"),
        ("max_tokens", True, "body.max_tokens"),
        ("min_tokens", -1, "min_tokens"),
        ("min_tokens", 17, "min_tokens"),
        ("seed", 2**63, "body.seed"),
        ("seed", -(2**63) - 1, "body.seed"),
        ("seed", 1e18, "body.seed"),
        ("seed", 1.5, "body.seed"),
        ("seed", "x", "body.seed"),
        ("stop", ["a"] * 5, "body.stop"),
        ("stop", ["a"] * 500_000, "body.stop"),
        ("stop", [1], "body.stop"),
        ("stop", "", "stop"),
        ("stop", "x" * 5000, "stop"),
        ("stop_token_ids", [-1], "body.stop_token_ids"),
        ("stop_token_ids", [258], "stop_token_ids"),
        ("stop_token_ids", [2**63], "body.stop_token_ids"),
        ("stop_token_ids", ["x"], "body.stop_token_ids"),
        ("stop_token_ids", [1] * 100_000, "body.stop_token_ids"),
        ("ignore_eos", "perhaps", "body.ignore_eos"),
        ("stream", 2, "body.stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("stream_options", {"include_usage": None}, "stream_options"),
        ("stream_options", {"x": 1}, "stream_options"),
        ("stream_options", {"include_usage": "x"}, "body.stream_options"),
        ("stream_options", [], "body.stream_options"),
        ("cache_salt", "", "body.cache_salt"),
        ("cache_salt", "a" * 129, "body.cache_salt"),
        ("cache_salt", "a\x00b", "body.cache_salt"),
        ("cache_salt", "a/b", "body.cache_salt"),
        ("cache_salt", 5, "body.cache_salt"),
        ("priority", 2**63, "body.priority"),
        ("priority", "soon", "body.priority"),
        ("request_id", "../x", "body.request_id"),
        ("request_id", "a" * 129, "body.request_id"),
        ("model", 1, "body.model"),
        ("presence_penalty", 2.1, "presence_penalty"),
        ("frequency_penalty", -2.1, "frequency_penalty"),
        ("frequency_penalty", "x", "body.frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("repetition_penalty", -1, "repetition_penalty"),
        ("repetition_penalty", 1e300, "repetition_penalty"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"1.5": 1}, "logit_bias"),
        ("logit_bias", {"": 1}, "logit_bias"),
        ("logit_bias", {"9" * 40: 1}, "logit_bias"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"258": 1}, "logit_bias"),
        ("logit_bias", {"5": "x"}, "body.logit_bias"),
        ("logit_bias", {"5": None}, "body.logit_bias"),
        ("logit_bias", {"5": {}}, "body.logit_bias"),
        ("logit_bias", [5], "body.logit_bias"),
        ("logit_bias", {str(i): 1 for i in range(2000)}, "body.logit_bias"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("allowed_token_ids", [258], "allowed_token_ids"),
        ("allowed_token_ids", [-1], "body.allowed_token_ids"),
        ("allowed_token_ids", [2**63], "body.allowed_token_ids"),
        ("allowed_token_ids", [True], "body.allowed_token_ids"),
        ("allowed_token_ids", [[1]], "body.allowed_token_ids"),
        ("allowed_token_ids", "5", "body.allowed_token_ids"),
        ("allowed_token_ids", [1] * 300_000, "body.allowed_token_ids"),
        ("bad_words", [""], "bad_words"),
        ("bad_words", "x", "body.bad_words"),
        ("bad_words", [1], "body.bad_words"),
        ("bad_words", ["x"] * 50_000, "body.bad_words"),
        ("bad_words", ["x" * 1000], "bad_words"),
        ("truncate_prompt_tokens", -2, "body.truncate_prompt_tokens"),
        ("truncate_prompt_tokens", 0, "truncate_prompt_tokens"),
        ("truncate_prompt_tokens", 257, "truncate_prompt_tokens"),
        ("truncate_prompt_tokens", 2**63, "body.truncate_prompt_tokens"),
        ("truncation_side", "top", "body.truncation_side"),
        ("truncation_side", ["left"], "body.truncation_side"),
        ("repetition_detection", [], "body.repetition_detection"),
        ("repetition_detection", {"max_pattern_size": "x"}, "body.repetition_detection"),
        ("repetition_detection", {"max_pattern_size": 10**6}, "repetition_detection.max_pattern_size"),
        ("repetition_detection", {"max_pattern_size": 3, "min_count": 1}, "repetition_detection.min_count"),
        ("stream_interval", 0, "body.stream_interval"),
        ("stream_interval", "x", "body.stream_interval"),
        ("spaces_between_special_tokens", "x", "body.spaces_between_special_tokens"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_bad_values_are_named(path: str, field: str, value: Any, param: str) -> None:
    base = {} if field == "max_tokens" else {"max_tokens": 16}
    status, answer, submitted = await ask(path, **base, **{field: value})
    error = answer[0]["error"]
    assert (status, error["param"]) == (400, param)
    assert error["type"] == ("Bad Request" if param.startswith("body.") else "BadRequestError")
    assert field in error["message"] or field == "stream_options"
    assert not submitted and len(error["message"]) < 400


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


ODD_VALUES: list[Any] = [
    True,
    -1,
    1.5,
    1e308,
    -(2**63),
    2**64 - 1,
    "",
    "\u0000",
    "x" * 20_000,
    [],
    {},
    [None],
    [[1], ["a"]],
    {"a": None},
    {"": {"": []}},
    [1, "a", None, 2.5],
    nested(90),
    [nested(40)] * 3,
]


@pytest.mark.parametrize(("path", "name"), HONOURED + REFUSED)
async def test_no_value_of_a_field_is_a_bug(path: str, name: str) -> None:
    """Each is taken, or refused with one short answer that names the field."""
    client = FakeClient()
    base = {**SUBJECTS[path], "max_tokens": 2}
    async with in_process(client) as http:
        for value in ODD_VALUES:
            answer = await http.post(path, json={**base, name: value})
            if answer.status_code == 200:
                continue
            error = answer.json()["error"]
            # A body without a model or with an endless prompt has its own words for it.
            known = (name, "input_text", "input_tokens") if name in ("prompt", "messages") else (name,)
            assert answer.status_code == (404 if name == "model" and type(value) is str else 400)
            assert error["param"].removeprefix("body.").split(".")[0] in known, (value, error)
            assert len(error["message"]) < 500
    assert not client.running


@pytest.mark.parametrize("path", PATHS)
async def test_lax_values_are_understood(path: str) -> None:
    plain = await ask(path, max_tokens=9, temperature=0.5, seed=3, ignore_eos=True, n=1)
    lax = await ask(
        path, max_tokens="9", temperature="0.5", seed=3.0, ignore_eos=1, n=None, stop=None, min_p=None
    )
    assert lax == plain and plain[0] == 200


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (-(2**63) - 1, "greater than or equal to -9223372036854775808"),
        (-(10**30), "greater than or equal to -9223372036854775808"),
        (2**63, "less than or equal to 9223372036854775807"),
        (2**64, "less than or equal to 9223372036854775807"),
        (10**30, "less than or equal to 9223372036854775807"),
        (2.0**60, "a valid integer"),
        (0.5, "a valid integer"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_a_seed_beyond_64_bits_is_told_its_bound(path: str, written: Any, problem: str) -> None:
    status, answer, _ = await ask(path, seed=written)
    assert (status, answer[0]["error"]["param"]) == (400, "body.seed")
    assert answer[0]["error"]["message"] == f"seed: Input should be {problem}."


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
async def test_the_bounds_of_a_seed_are_seeds(seed: int) -> None:
    assert (await ask("/v1/completions", seed=seed))[0] == 200


async def test_seed_minus_one_is_no_seed() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        await http.post("/v1/completions", json={"prompt": "hi", "seed": -1})
        await http.post("/v1/completions", json={"prompt": "hi", "seed": 0})
    assert [params.seed for _, params, _, _ in client.submitted] == [None, 0]


async def test_priority_header_wins() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        body = {"prompt": "hi", "priority": 1}
        await http.post("/v1/completions", json=body)
        await http.post("/v1/completions", json=body, headers={"x-vllm-priority": "-5"})
        bad = await http.post("/v1/completions", json=body, headers={"x-vllm-priority": "soon"})
    assert [priority for _, _, priority, _ in client.submitted] == [1, -5]
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "priority"


async def test_template_variables_are_an_allow_list() -> None:
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt", "tools"):
        status, answer, _ = await ask("/v1/chat/completions", chat_template_kwargs={name: "x"})
        assert (status, answer[0]["error"]["param"]) == (400, "body.chat_template_kwargs")
    for value in ({"enable_thinking": []}, {"date_string": "x" * 10_000}, [], "x"):
        assert (await ask("/v1/chat/completions", chat_template_kwargs=value))[0] == 400


async def test_both_turn_flags_exclude_each_other() -> None:
    status, answer, _ = await ask(
        "/v1/chat/completions", add_generation_prompt=True, continue_final_message=True
    )
    assert (status, answer[0]["error"]["param"]) == (400, "continue_final_message")


async def test_echo_alone_shows_no_token() -> None:
    status, answer, submitted = await ask("/v1/completions", max_tokens=0, echo=True)
    assert status == 200 and [params.max_tokens for _, params, _, _ in submitted] == [1]
    choice = answer[0]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert answer[0]["usage"]["completion_tokens"] == 0
    status, chunks, _ = await ask(
        "/v1/completions", max_tokens=0, echo=True, stream=True, stream_options={"include_usage": True}
    )
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["hi"]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0}


async def test_the_eos_token_can_be_a_stop_token_id() -> None:
    status, answer, _ = await ask("/v1/completions", max_tokens=200, ignore_eos=True, stop_token_ids=[EOS])
    assert status == 200 and answer[0]["choices"][0]["stop_reason"] == EOS
