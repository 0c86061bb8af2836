"""Log probabilities on the wire: forms, counts, order, offsets, byte strings, streamed as whole."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fake_client import BOS, EOS, IMPOSSIBLE, VOCAB_SIZE, FakeClient, score
from http_tools import events, in_process

from microvllm.openai_compat.api.chat_completions import ChatChunks
from microvllm.openai_compat.api.completions import CompletionChunks
from microvllm.openai_compat.api.logprobs import LOWEST, TokenText, finite
from microvllm.runtime.request import TokenLogprobs

HI = [{"role": "user", "content": "hi"}]
PATHS = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": HI}}
COMPLETIONS, CHAT = PATHS
# With special tokens shown, the tokens together are the text.
BASE: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "skip_special_tokens": False}


async def ask(
    path: str, /, *, args: dict[str, Any] | None = None, **body: Any
) -> tuple[int, Any, FakeClient]:
    client = FakeClient()
    async with in_process(client, **(args or {})) as http:
        answer = await http.post(path, json={**PATHS[path], **BASE, **body})
    streamed = body.get("stream") and answer.status_code == 200
    return answer.status_code, events(answer.text) if streamed else answer.json(), client


async def choice(path: str, /, **body: Any) -> dict[str, Any]:
    status, answer, _ = await ask(path, return_token_ids=True, **body)
    assert status == 200, answer
    return dict(answer["choices"][0])


def expected(prompt: list[int], made: list[int], count: int) -> list[TokenLogprobs]:
    return [score(prompt + made[:i], token, count) for i, token in enumerate(made)]


# ---- completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 20])
async def test_completion_form(count: int) -> None:
    found = await choice(COMPLETIONS, logprobs=count)
    logprobs = found["logprobs"]
    assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    entries = expected(found["prompt_token_ids"], found["token_ids"], count)
    assert logprobs["token_logprobs"] == [entry.logprobs[0] for entry in entries]
    assert "".join(logprobs["tokens"]) == found["text"]
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(12)]
    for token, top, entry in zip(logprobs["tokens"], logprobs["top_logprobs"], entries, strict=True):
        assert next(iter(top)) == token and top[token] == entry.logprobs[0]
        assert set(top.values()) <= {finite(value) for value in entry.logprobs}
        # Tokens that are a part of a character read alike.
        readable = {i for i in entry.token_ids if i < 128 or i >= 256}
        assert len(top.keys() - {"", "\ufffd"}) == len(readable)
    assert found["prompt_logprobs"] is None


async def test_no_logprobs() -> None:
    assert (await choice(COMPLETIONS))["logprobs"] is None
    assert (await choice(CHAT))["logprobs"] is None
    assert (await choice(CHAT, logprobs=False, top_logprobs=0))["logprobs"] is None


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("options", [{}, {"n": 2, "seed": 3}, {"stream_interval": 4}, {"stop": ["q", "xy"]}])
async def test_streamed_logprobs_are_the_whole_ones(echo: bool, options: dict[str, Any]) -> None:
    body = {"logprobs": 2, "echo": echo, "prompt": ["hi", "é"], "max_tokens": 30, **options}
    _, whole, _ = await ask(COMPLETIONS, **body)
    _, chunks, _ = await ask(COMPLETIONS, stream=True, **body)
    for wanted in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == wanted["index"]]
        assert "".join(part["text"] for part in own) == wanted["text"]
        for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs"):
            assert [item for part in own for item in part["logprobs"][name]] == wanted["logprobs"][name]


async def test_echo_scores_the_prompt() -> None:
    found = await choice(COMPLETIONS, prompt="hé", logprobs=3, echo=True)
    prompt = [BOS, *"hé".encode()]
    logprobs, made = found["logprobs"], found["token_ids"]
    assert found["prompt_token_ids"] == prompt and found["text"].startswith("hé")
    assert logprobs["tokens"][:4] == ["<s>", "h", "", "é"]
    assert logprobs["text_offset"][:6] == [0, 3, 4, 4, 5, 6]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    values = [score(prompt[:i], prompt[i], 3).logprobs[0] for i in range(1, 4)]
    assert logprobs["token_logprobs"][1:4] == values
    assert logprobs["token_logprobs"][4:] == [e.logprobs[0] for e in expected(prompt, made, 3)]
    # The form of `prompt_logprobs` comes along, as in vLLM.
    assert [
        value and value[str(token)]["logprob"]
        for token, value in zip(prompt, found["prompt_logprobs"], strict=True)
    ] == [None, *values]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_without_tokens_scores_the_prompt_alone(stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    status, answer, client = await ask(
        COMPLETIONS, prompt="abc", logprobs=1, echo=True, max_tokens=0, stream=stream, **options
    )
    assert status == 200 and [params.max_tokens for _, params, _, _ in client.submitted] == [1]
    (found, *rest) = [part for chunk in (answer if stream else [answer]) for part in chunk["choices"]]
    assert not rest and (found["text"], found["finish_reason"]) == ("abc", "length")
    assert found["logprobs"]["tokens"] == ["<s>", "a", "b", "c"]
    assert len(found["logprobs"]["top_logprobs"]) == 4
    usage = answer[-1]["usage"] if stream else answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 0)


async def test_echo_of_a_prompt_of_one_token() -> None:
    found = await choice(COMPLETIONS, prompt=[97], logprobs=0, echo=True, max_tokens=1)
    assert found["logprobs"]["token_logprobs"][0] is None and len(found["logprobs"]["tokens"]) == 2
    assert found["prompt_logprobs"] == [None]


# ---- chat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 0, 1, 5, 20])
async def test_chat_form(count: int | None) -> None:
    found = await choice(CHAT, logprobs=True, top_logprobs=count)
    content = found["logprobs"]["content"]
    assert list(found["logprobs"]) == ["content"] and len(content) == 12
    assert "".join(item["token"] for item in content) == found["message"]["content"]
    entries = expected([*b"user: hi\nassistant: "], found["token_ids"], count or 0)
    for item, entry in zip(content, entries, strict=True):
        assert list(item) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(item["bytes"]).decode() == item["token"]
        assert item["logprob"] == entry.logprobs[0]
        top = item["top_logprobs"]
        assert len(top) == (count or 0)
        if top:
            assert top[0] == {name: item[name] for name in ("token", "logprob", "bytes")}
            values = [other["logprob"] for other in top[1:]]
            assert values == sorted(values, reverse=True)


async def test_streamed_chat_logprobs_are_the_whole_ones() -> None:
    body = {"logprobs": True, "top_logprobs": 3, "n": 2, "seed": 1, "stop": "e", "max_tokens": 30}
    _, whole, _ = await ask(CHAT, **body)
    for interval in (1, 5):
        _, chunks, _ = await ask(CHAT, stream=True, stream_interval=interval, **body)
        for wanted in whole["choices"]:
            own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == wanted["index"]]
            assert own[0]["logprobs"] is None  # the role
            content = [item for part in own[1:] for item in part["logprobs"]["content"]]
            assert content == wanted["logprobs"]["content"]


# ---- both -----------------------------------------------------------------------------------------


async def test_the_whole_vocabulary() -> None:
    for path, body in ((COMPLETIONS, {"logprobs": -1}), (CHAT, {"logprobs": True, "top_logprobs": -1})):
        status, answer, _ = await ask(path, **body)
        field = "logprobs" if path == COMPLETIONS else "top_logprobs"
        assert (status, answer["error"]["param"]) == (400, field)
    client = FakeClient(max_logprobs=-1)
    async with in_process(client) as http:
        answer = (
            await http.post(
                CHAT, json={"messages": HI, "logprobs": True, "top_logprobs": -1, "max_tokens": 1}
            )
        ).json()
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(top) == VOCAB_SIZE and top[-1]["logprob"] == LOWEST


@pytest.mark.parametrize("path", PATHS)
async def test_chosen_tokens(path: str) -> None:
    ids = [100, IMPOSSIBLE, 5]
    found = await choice(path, logprobs=1, logprob_token_ids=ids)
    if path == COMPLETIONS:
        tops = [list(top.values()) for top in found["logprobs"]["top_logprobs"]]
    else:
        tops = [[o["logprob"] for o in item["top_logprobs"]] for item in found["logprobs"]["content"]]
    for top, token in zip(tops, found["token_ids"], strict=True):
        assert len(top) == len({token, *ids})
        assert LOWEST in top


@pytest.mark.parametrize("path", PATHS)
async def test_minus_infinity_of_the_token_itself(path: str) -> None:
    found = await choice(path, logprobs=0, allowed_token_ids=[IMPOSSIBLE])
    if path == COMPLETIONS:
        assert LOWEST in found["logprobs"]["token_logprobs"]
    else:
        found = await choice(path, logprobs=True, allowed_token_ids=[IMPOSSIBLE])
        assert LOWEST in [item["logprob"] for item in found["logprobs"]["content"]]


@pytest.mark.parametrize(
    ("asked", "flag", "as_ids"),
    [(None, True, True), (False, True, False), (True, False, True), (None, False, False)],
)
async def test_tokens_as_ids(asked: bool | None, flag: bool, as_ids: bool) -> None:
    args = {"return_tokens_as_token_ids": flag}
    wish = {"return_tokens_as_token_ids": asked, "return_token_ids": True}
    _, answer, _ = await ask(COMPLETIONS, args=args, logprobs=1, **wish)
    found = answer["choices"][0]
    named = [f"token_id:{token}" for token in found["token_ids"]]
    assert (found["logprobs"]["tokens"] == named) is as_ids
    assert all(
        (next(iter(top)) == name) is as_ids
        for top, name in zip(found["logprobs"]["top_logprobs"], named, strict=True)
    )
    _, answer, _ = await ask(CHAT, args=args, logprobs=True, top_logprobs=1, **wish)
    found = answer["choices"][0]
    for item, token in zip(found["logprobs"]["content"], found["token_ids"], strict=True):
        assert (item["token"] == item["top_logprobs"][0]["token"] == f"token_id:{token}") is as_ids
        assert bytes(item["bytes"]) == (b"</s>" if token == EOS else bytes([token]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [0, 2])
async def test_prompt_logprobs(path: str, count: int) -> None:
    _, answer, _ = await ask(path, prompt_logprobs=count, return_token_ids=True)
    place = answer["choices"][0] if path == COMPLETIONS else answer
    ids, found = place["prompt_token_ids"], place["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for i, position in enumerate(found[1:], 1):
        entry = score(ids[:i], ids[i], count)
        assert list(position) == list(dict.fromkeys(map(str, entry.token_ids)))
        first = position[str(ids[i])]
        assert list(first) == ["logprob", "rank", "decoded_token"]
        assert first == {"logprob": entry.logprobs[0], "rank": entry.rank, "decoded_token": chr(ids[i])}
        assert [value["rank"] for key, value in position.items() if key != str(ids[i])] == [
            rank for rank, token in enumerate(entry.token_ids) if rank and token != ids[i]
        ]
    if path == CHAT:
        assert "prompt_logprobs" not in answer["choices"][0]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"logprobs": -2}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "body.logprobs"),
        (COMPLETIONS, {"logprobs": 1, "top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": 5}, "body.logprobs"),
        (CHAT, {"logprobs": "many"}, "body.logprobs"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 1.5}, "body.top_logprobs"),
        (
            COMPLETIONS,
            {"echo": True, "max_tokens": 0, "logprobs": 1, "logprob_token_ids": [1]},
            "logprob_token_ids",
        ),
        *(
            (path, body, param)
            for path in PATHS
            for body, param in (
                ({"prompt_logprobs": -2}, "prompt_logprobs"),
                ({"prompt_logprobs": 21}, "prompt_logprobs"),
                ({"prompt_logprobs": "x"}, "body.prompt_logprobs"),
                ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
                ({"prompt_logprobs": -1, "stream": True}, "prompt_logprobs"),
                ({"logprob_token_ids": [1]}, "logprob_token_ids"),
                ({"logprobs": 1, "logprob_token_ids": [1] * 129}, "body.logprob_token_ids"),
                ({"logprobs": 1, "logprob_token_ids": [-1]}, "body.logprob_token_ids"),
                ({"logprobs": 1, "logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
                ({"logprobs": 1, "logprob_token_ids": 5}, "body.logprob_token_ids"),
                ({"return_tokens_as_token_ids": "perhaps"}, "body.return_tokens_as_token_ids"),
            )
        ),
    ],
)
async def test_wrong_wishes_are_named(path: str, body: dict[str, Any], param: str) -> None:
    status, answer, client = await ask(path, **body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert not client.submitted


async def test_a_stream_may_ask_for_the_prompts_own() -> None:
    """vLLM refuses only what it would have to leave out: 0 is let through."""
    for path in PATHS:
        assert (await ask(path, prompt_logprobs=0, stream=True))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "slow"),
    [
        (COMPLETIONS, {}, False),
        (COMPLETIONS, {"echo": True}, False),
        (COMPLETIONS, {"logprobs": 5}, False),
        (COMPLETIONS, {"logprobs": 0, "echo": True}, True),
        (COMPLETIONS, {"logprobs": -1}, True),
        (CHAT, {"logprobs": True, "top_logprobs": 5}, False),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, True),
    ],
)
async def test_chunks_of_many_numbers_are_made_in_a_thread(
    path: str, body: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take long enough for every other stream to notice."""
    threads = []
    for chunks in (CompletionChunks, ChatChunks):

        def chunk(*args: Any, made: Any = chunks.chunk) -> bytes:
            threads.append(threading.current_thread())
            return bytes(made(*args))

        monkeypatch.setattr(chunks, "chunk", chunk)
    async with in_process(FakeClient(max_logprobs=-1)) as http:
        await http.post(path, json={**PATHS[path], **BASE, **body, "stream": True})
    assert len(threads) == 12
    assert all((thread is not threading.current_thread()) == slow for thread in threads)


# ---- spelling -------------------------------------------------------------------------------------


def spelt(text: bytes) -> list[str]:
    tokenizer: Any = FakeClient().tokenizer
    token_text, found = TokenText(tokenizer), []
    for token in text:
        found.append(token_text.text_of(token))
        assert token_text.bytes_of(token) == [token]
        token_text.advance(token)
    return found


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aé", ["a", "", "é"]),
        ("€x", ["", "", "€", "x"]),
        ("😀!", ["", "", "", "😀", "!"]),
        (b"\xe2a", ["", "a"]),
        (b"\xe2\x82\xe2\x82\xac", ["", "", "\ufffd", "", "€"]),
        (b"\x80a", ["\ufffd", "a"]),
        (b"\xffa", ["\ufffd", "a"]),
    ],
)
def test_parts_of_characters(text: str | bytes, pieces: list[str]) -> None:
    assert spelt(text.encode() if isinstance(text, str) else text) == pieces


def test_a_token_that_the_tokenizer_does_not_have() -> None:
    tokenizer: Any = FakeClient().tokenizer
    token_text = TokenText(tokenizer)
    assert token_text.text_of(10**6) == "" and token_text.bytes_of(10**6) == []
    token_text.advance(10**6)
    assert token_text.text_of(97) == "a"


def test_a_tokenizer_without_a_table() -> None:
    tokenizer: Any = FakeClient().tokenizer
    tokenizer.token_bytes = None
    token_text = TokenText(tokenizer)
    token_text.advance(98)
    assert (token_text.text_of(97), token_text.bytes_of(97), token_text.text_of(BOS)) == ("a", [97], "<s>")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1.5, -1.5), (-float("inf"), LOWEST), (float("nan"), LOWEST), (-1e30, LOWEST), (0.0, 0.0)],
)
def test_numbers_that_json_lacks(value: float, shown: float) -> None:
    assert finite(value) == shown
