"""The wire forms of completions and chat: members, their order, chunks, usage, indices."""

# ruff: noqa: UP031 -- JSON is full of braces, which str.format would need doubled

from __future__ import annotations

import itertools
import json
from typing import Any
from urllib.parse import quote, unquote

import pytest
from fake_client import BOS, EOS, FakeClient
from http_tools import events, in_process

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": HI}}


async def post(client: FakeClient, path: str, /, *, args: dict[str, Any] | None = None, **body: Any) -> Any:
    async with in_process(client, **(args or {})) as http:
        answer = await http.post(path, json={**ENDPOINTS[path], **body})
    assert answer.status_code == 200, answer.text
    return events(answer.text) if body.get("stream") else answer.json()


def pieces(chunks: list[Any], index: int = 0) -> list[str]:
    """The texts of one choice's chunks."""
    choices = (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)
    return [choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices]


async def test_completion_body_is_vllms_member_for_member() -> None:
    async with in_process(FakeClient()) as http:
        text = (await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})).text
    body = json.loads(text)
    assert text == json.dumps(
        {
            "id": body["id"],
            "object": "text_completion",
            "created": body["created"],
            "model": "fake-model",
            "choices": [
                {
                    "index": 0,
                    "text": body["choices"][0]["text"],
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                    "routed_experts": None,
                    "weight_versions": None,
                }
            ],
            "service_tier": None,
            "system_fingerprint": body["system_fingerprint"],
            "usage": {
                "prompt_tokens": 3,
                "total_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        },
        separators=(",", ":"),
    )
    assert body["id"].startswith("cmpl-") and len(body["choices"][0]["text"]) == 2


async def test_chat_body_is_vllms_member_for_member() -> None:
    async with in_process(FakeClient()) as http:
        text = (await http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2})).text
    body = json.loads(text)
    assert text == json.dumps(
        {
            "id": body["id"],
            "object": "chat.completion",
            "created": body["created"],
            "model": "fake-model",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": body["choices"][0]["message"]["content"],
                        "refusal": None,
                        "annotations": None,
                        "audio": None,
                        "function_call": None,
                        "reasoning": None,
                    },
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                    "weight_versions": None,
                }
            ],
            "service_tier": None,
            "system_fingerprint": body["system_fingerprint"],
            "usage": {
                "prompt_tokens": 20,
                "total_tokens": 22,
                "completion_tokens": 2,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        },
        separators=(",", ":"),
    )
    assert body["id"].startswith("chatcmpl-")


@pytest.mark.parametrize(
    ("stream_options", "include_usage"),
    [
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
        ({"unknown": 1}, False),
        ({}, False),
    ],
)
async def test_completion_chunks_are_vllms_byte_for_byte(
    stream_options: dict[str, Any], include_usage: bool
) -> None:
    body = {"prompt": "hi", "max_tokens": 2}
    options = {"stream": True, "stream_options": stream_options}
    async with in_process(FakeClient()) as http:
        whole = (await http.post("/v1/completions", json=body)).json()
        answer = await http.post("/v1/completions", json={**body, **options})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, second = whole["choices"][0]["text"]
    seen = events(answer.text)[0]
    head = '{"id":"%s","object":"text_completion","created":%d,"model":"fake-model","choices":[' % (
        seen["id"],
        seen["created"],
    )
    fingerprint = f',"system_fingerprint":"{whole["system_fingerprint"]}"'
    choice = (
        '{"index":0,"text":"%s","logprobs":null,"finish_reason":%s,"stop_reason":null,'
        '"prompt_token_ids":null,"token_ids":null,"weight_versions":null}]%s,"kv_transfer_params":null}'
    )
    frames = [
        choice % (first, "null", ""),
        choice % (second, '"length"', "" if include_usage else fingerprint),
    ]
    if include_usage:
        frames.append(
            '],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}' + fingerprint + "}"
        )
    assert answer.text.split("\n\n") == [*(f"data: {head}{frame}" for frame in frames), "data: [DONE]", ""]


@pytest.mark.parametrize(
    ("stream_options", "include_usage"),
    [
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
        ({"unknown": 1}, False),
        ({}, False),
    ],
)
async def test_chat_chunks_are_vllms_byte_for_byte(
    stream_options: dict[str, Any], include_usage: bool
) -> None:
    body = {"messages": HI, "max_tokens": 2}
    options = {"stream": True, "stream_options": stream_options}
    async with in_process(FakeClient()) as http:
        whole = (await http.post("/v1/chat/completions", json=body)).json()
        answer = await http.post("/v1/chat/completions", json={**body, **options})
    first, second = whole["choices"][0]["message"]["content"]
    seen = events(answer.text)[0]
    head = '{"id":"%s","object":"chat.completion.chunk","created":%d,"model":"fake-model","choices":[' % (
        seen["id"],
        seen["created"],
    )
    fingerprint = f',"system_fingerprint":"{whole["system_fingerprint"]}"'
    frames = [
        '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"prompt_token_ids":null,"prompt_text":null}',
        '{"index":0,"delta":{"content":"%s"},"logprobs":null,"finish_reason":null,"token_ids":null}],'
        '"kv_transfer_params":null}' % first,
        '{"index":0,"delta":{"content":"%s"},"logprobs":null,"finish_reason":"length","stop_reason":null,'
        '"token_ids":null,"weight_versions":null}]%s,"kv_transfer_params":null}'
        % (second, "" if include_usage else fingerprint),
    ]
    if include_usage:
        frames.append(
            '],"usage":{"prompt_tokens":20,"total_tokens":22,"completion_tokens":2}' + fingerprint + "}"
        )
    assert answer.text.split("\n\n") == [*(f"data: {head}{frame}" for frame in frames), "data: [DONE]", ""]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 12, "ignore_eos": True},
        {"max_tokens": 40, "stop": ["q", "xy"]},
        {"max_tokens": 40, "stop": "e", "include_stop_str_in_output": True},
        {"max_tokens": 9, "n": 3, "seed": 42},
        {"max_tokens": 9, "n": 2, "seed": 1, "stop": ["a"]},
        {"max_tokens": 9, "echo": True},
    ],
)
async def test_a_stream_says_what_the_whole_answer_says(path: str, body: dict[str, Any]) -> None:
    if path.endswith("chat/completions") and body.get("echo"):
        tail = {"role": "assistant", "content": "I think"}
        body = {
            **body,
            "messages": [*HI, tail],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
    client = FakeClient()
    whole = await post(client, path, **body)
    chunks = await post(client, path, stream=True, stream_options={"include_usage": True}, **body)
    for index, choice in enumerate(whole["choices"]):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert "".join(pieces(chunks, index)) == text
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
    assert {len(chunk["choices"]) for chunk in chunks[:-1]} == {1}
    assert chunks[-1]["choices"] == []
    final = {name: value for name, value in whole["usage"].items() if value is not None}
    assert chunks[-1]["usage"] == final
    assert not client.running


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_one_chunk_a_token(path: str) -> None:
    chunks = await post(FakeClient(), path, stream=True, max_tokens=25, ignore_eos=True)
    roles = 1 if "chat" in path else 0
    assert len(chunks) == 25 + roles
    assert [("role" in chunk["choices"][0].get("delta", {})) for chunk in chunks] == [True] * roles + [
        False
    ] * 25


@pytest.mark.parametrize(("usage", "continuous"), [*itertools.product([None, False, True], repeat=2)])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_usage_options(path: str, usage: bool | None, continuous: bool | None) -> None:
    wishes = {"include_usage": usage, "continuous_usage_stats": continuous}
    options = {name: wish for name, wish in wishes.items() if wish is not None}
    chunks = await post(
        FakeClient(), path, stream=True, stream_options=options, max_tokens=5, ignore_eos=True, n=2, seed=3
    )
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 10
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 10
    if not (usage and continuous):
        assert all("usage" not in chunk for chunk in chunks)
        return
    for index in range(2):
        counts = [c["usage"]["completion_tokens"] for c in chunks if c["choices"][0]["index"] == index]
        assert counts == ([0] if "chat" in path else []) + [1, 2, 3, 4, 5]


async def test_prompts_and_samples_are_numbered_prompt_by_prompt() -> None:
    client = FakeClient()
    body = {"max_tokens": 6, "ignore_eos": True, "seed": 5, "n": 2}
    alone = [
        await post(client, "/v1/completions", **{**body, "prompt": prompt}) for prompt in ("ab", "cd", "ef")
    ]
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert len(set(texts)) == 6
    together = await post(client, "/v1/completions", **{**body, "prompt": ["ab", "cd", "ef"]})
    assert [choice["index"] for choice in together["choices"]] == [*range(6)]
    assert [choice["text"] for choice in together["choices"]] == texts
    assert together["usage"]["prompt_tokens"] == 9 and together["usage"]["completion_tokens"] == 36
    chunks = await post(client, "/v1/completions", **{**body, "prompt": ["ab", "cd", "ef"], "stream": True})
    assert ["".join(pieces(chunks, index)) for index in range(6)] == texts
    assert {c["choices"][0]["index"] for c in chunks[:6]} == {
        *range(6)
    }  # interleaved, not one after the other


async def test_prompt_forms_are_the_same_prompt() -> None:
    client = FakeClient()
    ids = [BOS, *b"hi"]
    forms = ["hi", ["hi"], ids, [ids]]
    answers = [await post(client, "/v1/completions", prompt=form) for form in forms]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


async def test_echo_of_text_and_ids() -> None:
    client = FakeClient()
    plain = await post(client, "/v1/completions", max_tokens=4)
    for prompt, shown in (("hi", "hi"), ([*b"hi"], "hi")):
        echoed = await post(client, "/v1/completions", prompt=prompt, max_tokens=4, echo=True)
        assert echoed["choices"][0]["text"].startswith(shown)
        assert len(echoed["choices"][0]["text"]) == len(shown) + 4
    assert echoed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    several = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 2, "echo": True}
    answer = await post(client, "/v1/completions", **several)
    assert [choice["text"][:2] for choice in answer["choices"]] == ["ab", "ab", "cd", "cd"]
    chunks = await post(client, "/v1/completions", **several, stream=True)
    assert [pieces(chunks, index)[0][:2] for index in range(4)] == ["ab", "ab", "cd", "cd"]
    chunks = await post(client, "/v1/completions", max_tokens=4, echo=True, stream=True)
    assert pieces(chunks)[0] == "hi" + plain["choices"][0]["text"][0] and len(chunks) == 4
    ids = [chunk["choices"][0]["prompt_token_ids"] for chunk in chunks]
    assert ids == [[BOS, *b"hi"], None, None, None]


async def test_return_token_ids() -> None:
    client = FakeClient()
    whole = await post(client, "/v1/completions", max_tokens=4, return_token_ids=True)
    assert whole["choices"][0]["prompt_token_ids"] == [BOS, *b"hi"]
    ids = whole["choices"][0]["token_ids"]
    assert bytes(ids).decode() == whole["choices"][0]["text"]
    chunks = await post(client, "/v1/completions", max_tokens=4, return_token_ids=True, stream=True)
    assert [chunk["choices"][0]["prompt_token_ids"] for chunk in chunks] == [[BOS, *b"hi"], None, None, None]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == ids

    chat = await post(client, "/v1/chat/completions", max_tokens=4, return_token_ids=True)
    chunks = await post(client, "/v1/chat/completions", max_tokens=4, return_token_ids=True, stream=True)
    assert chunks[0]["prompt_token_ids"] == chat["prompt_token_ids"] == [*b"user: hi\nassistant: "]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    streamed = [token for chunk in chunks[1:] for token in chunk["choices"][0]["token_ids"]]
    assert streamed == chat["choices"][0]["token_ids"]


async def test_stop_reasons() -> None:
    client = FakeClient()
    long = await post(client, "/v1/completions", max_tokens=200)
    assert (long["choices"][0]["finish_reason"], long["choices"][0]["stop_reason"]) == ("stop", None)
    text = long["choices"][0]["text"]
    by_text = await post(client, "/v1/completions", max_tokens=200, stop=[text[3:5]])
    assert by_text["choices"][0]["stop_reason"] == text[3:5]
    assert by_text["choices"][0]["text"] == text[: text.index(text[3:5])]
    by_id = await post(client, "/v1/completions", max_tokens=200, stop_token_ids=[ord(text[2])])
    assert by_id["choices"][0]["stop_reason"] == ord(text[2])
    eos = await post(client, "/v1/completions", max_tokens=200, ignore_eos=True, stop_token_ids=[EOS])
    assert eos["choices"][0]["stop_reason"] == EOS


async def test_ids_and_names() -> None:
    client = FakeClient()
    async with in_process(client, served_model_names=("first", "second")) as http:
        body = {"prompt": "hi", "model": "second", "request_id": "from-body"}
        named = await http.post("/v1/completions", json=body)
        header = await http.post("/v1/completions", json=body, headers={"x-request-id": "from-header"})
        forged = await http.post("/v1/completions", json=body, headers={"x-request-id": "a b\tc/../d"})
        models = (await http.get("/v1/models")).json()
    assert named.json()["model"] == "first"
    assert named.json()["id"] == "cmpl-from-body"
    assert header.json()["id"] == "cmpl-from-header"
    assert forged.json()["id"] == "cmpl-from-body"
    assert [card["id"] for card in models["data"]] == ["first", "second"]
    assert models["data"][0]["root"] == "/models/fake-model" and models["data"][0]["max_model_len"] == 256
    assert models["object"] == "list" and models["data"][0]["object"] == "model"


@pytest.mark.parametrize("name", ["plain", "org/model", "/folder/of a model", "mod%C3%A8le"])
async def test_one_model(name: str) -> None:
    served = unquote(name)
    async with in_process(FakeClient(), served_model_names=("other", served)) as http:
        listed = (await http.get("/v1/models")).json()["data"][1]
        for address in (name, quote(served, safe="")):
            card = await http.get(f"/v1/models/{address}")
            assert card.json() == listed and listed["id"] == served
        assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()
        for unknown in ("nobody", "plain/", "other/plain"):
            missing = await http.get(f"/v1/models/{unknown}")
            error = missing.json()["error"]
            assert (missing.status_code, error["type"], error["param"]) == (404, "NotFoundError", "model")


async def test_generation_config_gives_defaults_and_a_limit() -> None:
    client = FakeClient(defaults={"temperature": 0.5, "top_k": 7, "max_tokens": 6})
    await post(client, "/v1/completions", top_p=0.5)
    await post(client, "/v1/chat/completions")
    await post(client, "/v1/completions", max_tokens=50, temperature=0)
    first, second, third = (params for _, params, _, _ in client.submitted)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.5, 0.5, 7, 6)
    assert second.max_tokens == 6
    assert third.greedy and third.max_tokens == 6


async def test_max_tokens_defaults() -> None:
    client = FakeClient()
    await post(client, "/v1/completions")
    await post(client, "/v1/chat/completions")
    await post(client, "/v1/chat/completions", max_tokens=5, max_completion_tokens=3)
    assert [params.max_tokens for _, params, _, _ in client.submitted] == [16, None, 3]


async def test_usage_flags_of_the_server() -> None:
    args = {"enable_prompt_tokens_details": True, "enable_force_include_usage": True}
    whole = await post(FakeClient(), "/v1/completions", args=args)
    assert whole["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "created_cache_tokens": None,
        "multimodal_tokens": None,
    }
    chunks = await post(FakeClient(), "/v1/completions", args=args, stream=True, max_tokens=3)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_tokenize_and_back() -> None:
    async with in_process(FakeClient()) as http:
        plain = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        bare = (await http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False})).json()
        chat = (await http.post("/tokenize", json={"messages": HI})).json()
        back = (await http.post("/detokenize", json={"tokens": plain["tokens"]})).json()
        nothing = (await http.post("/tokenize", json={"prompt": ""})).json()
    assert plain == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [BOS, 104, 195, 169],
        "token_strs": ["<s>", "h", "Ã", "©"],
    }
    assert bare["tokens"] == [104, 195, 169] and bare["token_strs"] is None
    assert chat["tokens"] == [*b"user: hi\nassistant: "]
    assert back == {"prompt": "<s>hé"}
    assert nothing["tokens"] == [BOS]


async def test_probes() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/ready")):
            client.alive = True
            answer = await http.request(method, path)
            assert (answer.status_code, answer.content) == (200, b"")
            client.alive = False
            answer = await http.request(method, path)
            assert (answer.status_code, answer.content) == (503, b"")
        assert set((await http.get("/version")).json()) == {"version"}
