"""What single request fields do: truncation, biases, chunk intervals, template variables, metrics."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from fake_client import BOS, EOS, FakeClient
from http_tools import events, in_process

from microvllm.openai_compat.api.usage import request_metrics
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.metrics.observer import RequestTiming

HI = [{"role": "user", "content": "hi"}]
PATHS = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": HI}}
COMPLETIONS, CHAT = PATHS


async def ask(
    path: str, /, *, args: dict[str, Any] | None = None, client: FakeClient | None = None, **body: Any
) -> tuple[int, Any, FakeClient]:
    client = client or FakeClient()
    async with in_process(client, **(args or {})) as http:
        answer = await http.post(path, json={**PATHS[path], **body})
    streamed = body.get("stream") and answer.status_code == 200
    return answer.status_code, events(answer.text) if streamed else answer.json(), client


async def prompt_of(path: str, /, **body: Any) -> list[int]:
    """The prompt that reached the engine."""
    status, answer, client = await ask(path, max_tokens=1, **body)
    assert status == 200, answer
    return client.submitted[0][0]


# ---- the prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "wanted"),
    [
        ("abcdef", {"truncate_prompt_tokens": 3}, [BOS, *b"ef"]),
        ("abcdef", {"truncate_prompt_tokens": 3, "truncation_side": "left"}, [*b"def"]),
        ("abcdef", {"truncate_prompt_tokens": 3, "truncation_side": "right"}, [BOS, *b"ab"]),
        ("abcdef", {"truncate_prompt_tokens": 3, "add_special_tokens": False}, [*b"def"]),
        ("abcdef", {"truncate_prompt_tokens": 1}, [*b"f"]),
        ("abcdef", {"truncate_prompt_tokens": 7}, [BOS, *b"abcdef"]),
        ("abcdef", {"truncate_prompt_tokens": 256}, [BOS, *b"abcdef"]),
        ([*b"abcdef"], {"truncate_prompt_tokens": 2}, [*b"ef"]),
        ([*b"abcdef"], {"truncate_prompt_tokens": 2, "truncation_side": "right"}, [*b"ab"]),
        ("x" * 500, {"truncate_prompt_tokens": -1}, [BOS, *b"x" * 254]),
        ([97] * 500, {"truncate_prompt_tokens": -1}, [97] * 255),
        ("a" * 2_000_000 + "z", {"truncate_prompt_tokens": 2, "truncation_side": "left"}, [*b"az"]),
        ("z" + "a" * 2_000_000, {"truncate_prompt_tokens": 3, "truncation_side": "right"}, [BOS, *b"za"]),
    ],
)
async def test_truncation(prompt: Any, options: dict[str, Any], wanted: list[int]) -> None:
    assert await prompt_of(COMPLETIONS, prompt=prompt, **options) == wanted


async def test_truncation_of_a_chat() -> None:
    long = [{"role": "user", "content": "x" * 1000}]
    assert (await ask(CHAT, messages=long))[0] == 400
    ids = await prompt_of(CHAT, messages=long, truncate_prompt_tokens=-1)
    assert len(ids) == 255 and bytes(ids).endswith(b"x\nassistant: ")
    ids = await prompt_of(CHAT, messages=long, truncate_prompt_tokens=8, truncation_side="right")
    assert bytes(ids) == b"user: xx"


async def test_a_truncation_that_leaves_no_room_is_refused() -> None:
    status, answer, _ = await ask(COMPLETIONS, prompt=[97] * 300, truncate_prompt_tokens=256)
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("prompt", "shown"), [("abcdef", "ef"), ([*b"abcdef"], "def"), (["ab", "cdefg"], "ab")]
)
async def test_echo_shows_the_truncated_prompt(prompt: Any, shown: str) -> None:
    _, answer, _ = await ask(COMPLETIONS, prompt=prompt, truncate_prompt_tokens=3, echo=True, max_tokens=1)
    assert answer["choices"][0]["text"].startswith(shown)
    assert len(answer["choices"][0]["text"]) == len(shown) + 1


async def test_the_text_of_a_chat_prompt() -> None:
    _, answer, client = await ask(CHAT, return_prompt_text=True, max_tokens=2)
    text = "user: hi\nassistant: "
    assert answer["prompt_text"] == text and client.submitted[0][0] == [*text.encode()]
    _, chunks, _ = await ask(CHAT, return_prompt_text=True, max_tokens=2, stream=True)
    assert chunks[0]["prompt_text"] == text
    assert all("prompt_text" not in chunk for chunk in chunks[1:])


async def test_an_effort_becomes_one_that_the_template_knows() -> None:
    args = {"reasoning_effort_map": {"xhigh": "max", "minimal": "none"}}
    for effort, variables in (
        ("xhigh", "enable_thinking=True;reasoning_effort=max;"),
        ("minimal", "enable_thinking=False;reasoning_effort=none;"),
        ("low", "enable_thinking=True;reasoning_effort=low;"),
    ):
        ids = await prompt_of(CHAT, args=args, reasoning_effort=effort)
        assert bytes(ids).decode() == f"user: hi\nassistant: {variables}"


@pytest.mark.parametrize(
    ("defaults", "body", "variables"),
    [
        ({}, {"reasoning_effort": "high"}, "enable_thinking=True;reasoning_effort=high;"),
        ({}, {"reasoning_effort": "none"}, "enable_thinking=False;reasoning_effort=none;"),
        (
            {},
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking=False;reasoning_effort=low;",
        ),
        ({"enable_thinking": False}, {}, "enable_thinking=False;"),
        (
            {"enable_thinking": False},
            {"chat_template_kwargs": {"enable_thinking": True}},
            "enable_thinking=True;",
        ),
        (
            {"enable_thinking": False},
            {"reasoning_effort": "max"},
            "enable_thinking=True;reasoning_effort=max;",
        ),
        ({"date_string": "x"}, {"chat_template_kwargs": {"thinking": True}}, "date_string=x;thinking=True;"),
    ],
)
async def test_template_variables(defaults: dict[str, Any], body: dict[str, Any], variables: str) -> None:
    args = {"default_chat_template_kwargs": defaults}
    ids = await prompt_of(CHAT, args=args, **body)
    assert bytes(ids).decode() == f"user: hi\nassistant: {variables}"
    if "reasoning_effort" not in body:
        async with in_process(FakeClient(), **args) as http:
            counted = (await http.post("/tokenize", json={"messages": HI, **body})).json()
        assert counted["tokens"] == ids


@pytest.mark.parametrize("effort", ["huge", "", 1, True, ["low"], {}])
async def test_unknown_efforts(effort: Any) -> None:
    status, answer, _ = await ask(CHAT, reasoning_effort=effort)
    assert (status, answer["error"]["param"]) == (400, "body.reasoning_effort")


@pytest.mark.parametrize(
    "options",
    [
        {"stream_interval": 0},
        {"default_chat_template_kwargs": {"tokenize": False}},
        {"default_chat_template_kwargs": {"enable_thinking": []}},
    ],
)
def test_wrong_server_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--(stream-interval|default-chat-template-kwargs)"):
        ServerArgs(**options)


# ---- the sampling ---------------------------------------------------------------------------------


async def test_biases_are_read_from_strings_and_clamped() -> None:
    _, _, client = await ask(COMPLETIONS, logit_bias={"5": 1000, "+6": "-1e9", "7": 3})
    assert client.submitted[0][1].logit_bias == {5: 100.0, 6: -100.0, 7: 3.0}


async def test_every_wrong_bias_key_is_listed() -> None:
    status, answer, _ = await ask(COMPLETIONS, logit_bias={"a": 1, "5": 1, "b c": 2, "x" * 5000: 1})
    message = answer["error"]["message"]
    assert status == 400 and "'a'" in message and "'b c'" in message and "'5'" not in message
    assert len(message) < 400


async def test_unknown_token_ids_are_listed_with_the_vocabulary_size() -> None:
    for field, value in (("logit_bias", {"300": 1, "5": 1, "999": 1}), ("allowed_token_ids", [300, 5, 999])):
        status, answer, _ = await ask(COMPLETIONS, **{field: value})
        message = answer["error"]["message"]
        assert status == 400 and all(part in message for part in (field, "300", "999", "258"))
    for key, shown in (("-1", "-1."), ("-0", None), ("-99999999999999999", "-99999999999999999.")):
        status, answer, _ = await ask(COMPLETIONS, logit_bias={key: 1, "5": 1})
        assert status == (400 if shown else 200)
        if shown:
            message = answer["error"]["message"]
            assert f"vocabulary: {shown}" in message and message.endswith("size is 258: ids are 0 to 257.")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("repetition_penalty", [1e-6, 1e30]),
        ("logit_bias", [{"257": 100}, {}]),
        ("n", [1, 128]),
        ("stream_interval", [1, 10**9]),
        ("truncate_prompt_tokens", [1, 255]),
    ],
)
async def test_the_edges_of_the_ranges(field: str, values: list[Any]) -> None:
    for value in values:
        assert (await ask(COMPLETIONS, max_tokens=2, **{field: value}))[0] == 200


@pytest.mark.parametrize(
    ("name", "default", "own"),
    [
        ("repetition_penalty", 1.3, 1.1),
        ("presence_penalty", 1.5, 0.0),
        ("frequency_penalty", 0.5, -0.5),
        ("skip_special_tokens", False, True),
    ],
)
async def test_a_generation_config_gives_what_a_request_does_not(name: str, default: Any, own: Any) -> None:
    client = FakeClient(defaults={name: default})
    for body in ({}, {name: own}):
        await ask(COMPLETIONS, client=client, **body)
    assert [getattr(params, name) for _, params, _, _ in client.submitted] == [default, own]


async def test_spaces_between_special_tokens() -> None:
    """Never there where a text is its tokens' bytes; elsewhere nobody can take them out again."""
    body = {"ignore_eos": True, "max_tokens": 100, "skip_special_tokens": False}
    _, plain, _ = await ask(COMPLETIONS, **body)
    status, without, _ = await ask(COMPLETIONS, spaces_between_special_tokens=False, **body)
    assert status == 200 and without["choices"] == plain["choices"]
    client = FakeClient()
    client.tokenizer.token_bytes = None
    assert (await ask(COMPLETIONS, client=client))[0] == 200
    status, answer, _ = await ask(COMPLETIONS, client=client, spaces_between_special_tokens=False)
    assert (status, answer["error"]["param"]) == (400, "spaces_between_special_tokens")


async def test_the_stop_token_is_shown_on_request() -> None:
    body = {"max_tokens": 200, "skip_special_tokens": False, "include_stop_str_in_output": True}
    _, answer, _ = await ask(COMPLETIONS, **body)
    assert answer["choices"][0]["text"].endswith("</s>") and answer["choices"][0]["finish_reason"] == "stop"
    _, answer, _ = await ask(COMPLETIONS, stop_token_ids=[EOS], ignore_eos=True, **body)
    assert answer["choices"][0]["text"].endswith("</s>") and answer["choices"][0]["stop_reason"] == EOS


async def test_repetition_ends_a_choice() -> None:
    wish = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2}
    _, answer, _ = await ask(COMPLETIONS, max_tokens=200, ignore_eos=True, repetition_detection=wish)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    _, answer, _ = await ask(COMPLETIONS, max_tokens=200, ignore_eos=True, repetition_detection={})
    assert answer["choices"][0]["finish_reason"] == "length"


# ---- the chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "asked", "lengths"),
    [
        (1, None, [1] * 10),
        (1, 1, [1] * 10),
        (1, 3, [1, 3, 3, 3]),
        (4, None, [1, 4, 4, 1]),
        (4, 2, [1, 4, 4, 1]),
        (1, 100, [1, 9]),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_stream_interval(path: str, flag: int, asked: int | None, lengths: list[int]) -> None:
    options = {"max_tokens": 10, "ignore_eos": True, "return_token_ids": True, "n": 2, "seed": 4}
    _, whole, _ = await ask(path, **options)
    args = {"stream_interval": flag}
    _, chunks, _ = await ask(path, args=args, stream=True, stream_interval=asked, **options)
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        own = [part for part in own if "role" not in part.get("delta", {})]
        assert [len(part["token_ids"]) for part in own] == lengths
        ids = [token for part in own for token in part["token_ids"]]
        assert ids == whole["choices"][index]["token_ids"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["length"]


async def test_a_short_answer_is_not_held_back() -> None:
    _, chunks, _ = await ask(COMPLETIONS, stream=True, stream_interval=50, max_tokens=1)
    assert len(chunks) == 1
    _, chunks, client = await ask(
        COMPLETIONS, stream=True, stream_interval=50, max_tokens=9, ignore_eos=True, stop=["zzz"]
    )
    assert len(chunks) == 2 and not client.running


# ---- the cost -------------------------------------------------------------------------------------

TIMES = [
    "time_to_first_token_ms",
    "generation_time_ms",
    "queue_time_ms",
    "mean_itl_ms",
    "tokens_per_second",
]


@pytest.mark.parametrize("path", PATHS)
async def test_metrics_of_a_request(path: str) -> None:
    args = {"enable_per_request_metrics": True}
    _, answer, _ = await ask(path, args=args, max_tokens=5, ignore_eos=True)
    found = answer["metrics"]
    assert list(found) == [*TIMES, "speculative_decoding"] and found["speculative_decoding"] is None
    assert all(found[name] >= 0 for name in TIMES)
    _, answer, _ = await ask(path, args=args, max_tokens=5, n=2)
    assert answer["metrics"] is None
    options = {"stream": True, "max_tokens": 5, "ignore_eos": True}
    _, chunks, _ = await ask(path, args=args, stream_options={"include_usage": True}, **options)
    assert list(chunks[-1]["metrics"]) == TIMES
    assert all("metrics" not in chunk for chunk in chunks[:-1])
    _, chunks, _ = await ask(path, args=args, **options)
    assert all("metrics" not in chunk for chunk in chunks)
    _, chunks, _ = await ask(path, stream_options={"include_usage": True}, **options)
    assert all("metrics" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_is_not_obfuscated(path: str) -> None:
    """Who relies on it has to know."""
    status, answer, _ = await ask(path, stream=True, stream_options={"include_obfuscation": True})
    assert status == 400 and answer["error"]["param"] == "stream_options"
    assert "stream_options.include_obfuscation is not supported" in answer["error"]["message"]
    options = {"include_obfuscation": False, "include_usage": True}
    assert (await ask(path, stream=True, stream_options=options))[0] == 200


def test_the_times_of_a_request() -> None:
    timing = RequestTiming(10.0, 10.5, 11.5, 13.5)
    assert request_metrics(timing, 5) == {
        "time_to_first_token_ms": 1000.0,
        "generation_time_ms": 2000.0,
        "queue_time_ms": 500.0,
        "mean_itl_ms": 500.0,
        "tokens_per_second": 5 / 3,
        "speculative_decoding": None,
    }
    one = request_metrics(RequestTiming(10.0, 10.5, 11.5, 11.5), 1)
    assert one["mean_itl_ms"] is None and one["tokens_per_second"] == 1.0
    assert set(request_metrics(RequestTiming(10.0), 0).values()) == {None}


# ---- the number of stop strings -----------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("limit", "given", "status"), [(4, 4, 200), (4, 5, 400), (6, 6, 200), (1, 2, 400)])
async def test_the_server_says_how_many_stop_strings_a_request_may_have(
    path: str, limit: int, given: int, status: int
) -> None:
    stop = [f"never {i}" for i in range(given)]
    got, answer, _ = await ask(path, args={"max_stop_strings": limit}, stop=stop)
    assert got == status
    if status == 400:
        assert answer["error"]["param"] == "body.stop" and "--max-stop-strings" in answer["error"]["message"]


async def test_each_of_many_stop_strings_stops() -> None:
    options = {"prompt": "hi", "seed": 1, "ignore_eos": True, "max_tokens": 30}
    _, whole, _ = await ask(COMPLETIONS, **options)
    stop = whole["choices"][0]["text"][10:14]
    others = [f"never {i}" for i in range(9)]
    _, answer, _ = await ask(COMPLETIONS, args={"max_stop_strings": 10}, **options, stop=[*others, stop])
    assert answer["choices"][0]["stop_reason"] == stop


@pytest.mark.parametrize(("ranks", "mode", "shown"), [(1, "full", ""), (2, "full", "-tp2"), (2, "hash", "")])
async def test_the_fingerprint_has_the_number_of_ranks(ranks: int, mode: str, shown: str) -> None:
    client = FakeClient()
    client.config = dataclasses.replace(client.config, tensor_parallel_size=ranks)
    status, body, _ = await ask(COMPLETIONS, client=client, args={"fingerprint_mode": mode}, max_tokens=1)
    assert status == 200
    assert re.fullmatch(rf"microvllm-[0-9.]+{shown}-[0-9a-f]{{8}}", body["system_fingerprint"])
