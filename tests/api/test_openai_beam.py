"""Beam search over the HTTP surface, against an exhaustive one over the fake engine's probabilities."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest
from fake_client import BOS, EOS, VOCAB_SIZE, FakeClient, score
from http_tools import in_process

from microvllm.runtime.errors import EngineDeadError

HI = [{"role": "user", "content": "hi"}]
PATHS = {"/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": HI}}
COMPLETIONS, CHAT = PATHS
BEAMS: dict[str, Any] = {"use_beam_search": True, "max_tokens": 3, "n": 3, "return_token_ids": True}


async def ask(path: str, client: FakeClient | None = None, /, **body: Any) -> tuple[int, Any]:
    async with in_process(client or FakeClient()) as http:
        answer = await http.post(path, json={**PATHS[path], **BEAMS, **body})
    return answer.status_code, answer.json()


def reference(
    prompt: list[int], width: int, steps: int, penalty: float, ends: set[int]
) -> list[tuple[list[int], bool]]:
    """Beam search by its definition: the best of `width` live beams a step, ended ones put aside."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(steps):
        found = []
        for total, tokens in live:
            entry = score(prompt + tokens, 97, 2 * width)
            pairs = list(zip(entry.token_ids, entry.logprobs, strict=True))[1:]
            found += [(total + logprob, [*tokens, token]) for token, logprob in pairs]
        found.sort(key=lambda beam: -beam[0])
        ended += [beam for beam in found if beam[1][-1] in ends]
        live = [beam for beam in found if beam[1][-1] not in ends][:width]
    scored = [(total / len(t) ** penalty, t, True) for total, t in ended]
    scored += [(total / len(t) ** penalty, t, False) for total, t in live]
    scored.sort(key=lambda beam: -beam[0])
    return [(tokens, done) for _, tokens, done in scored[:width]]


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
@pytest.mark.parametrize("width", [1, 2, 5])
async def test_the_best_beams_are_found(width: int, penalty: float) -> None:
    prompt = [BOS, *b"hi"]
    # Tokens that come often in this prompt's beams, so that some of them end.
    ends = {tokens[1] for tokens, _ in reference(prompt, width, 4, penalty, set())[1:]}
    _, answer = await ask(
        COMPLETIONS, n=width, max_tokens=4, length_penalty=penalty, stop_token_ids=sorted(ends)
    )
    wanted = reference(prompt, width, 4, penalty, ends | {EOS})
    assert any(done for _, done in wanted) or width == 1 or penalty > 1  # which favours the long ones
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [*range(width)]
    assert [choice["token_ids"] for choice in choices] == [tokens for tokens, _ in wanted]
    for choice, (tokens, done) in zip(choices, wanted, strict=True):
        assert choice["finish_reason"] == ("stop" if done else "length")
        assert choice["stop_reason"] == (tokens[-1] if done and tokens[-1] != EOS else None)
        shown = bytes(token for token in (tokens[:-1] if done else tokens) if token < BOS)
        assert choice["text"] == shown.decode("utf-8", "replace")
    assert answer["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in wanted)


async def test_chat_and_completions_search_alike() -> None:
    _, chat = await ask(CHAT)
    _, completion = await ask(COMPLETIONS, prompt=[*b"user: hi\nassistant: "])
    assert [choice["token_ids"] for choice in chat["choices"]] == [
        choice["token_ids"] for choice in completion["choices"]
    ]


async def test_nothing_is_drawn() -> None:
    plain = await ask(COMPLETIONS)
    for options in ({"temperature": 0}, {"temperature": 2.0, "seed": 5}, {"top_p": 0.1, "top_k": 1}):
        assert (await ask(COMPLETIONS, **options))[1]["choices"] == plain[1]["choices"]


async def test_several_prompts() -> None:
    client = FakeClient()
    _, together = await ask(COMPLETIONS, client, prompt=["ab", "cd"], n=2)
    alone = [(await ask(COMPLETIONS, prompt=prompt, n=2))[1]["choices"] for prompt in ("ab", "cd")]
    assert [choice["text"] for choice in together["choices"]] == [
        choice["text"] for choice in itertools.chain(*alone)
    ]
    assert not client.running
    # One token a step: the prompt, then what each beam of the step before has become.
    assert {params.max_tokens for _, params, _, _ in client.submitted} == {1}
    assert len(client.submitted) == 2 * (1 + 2 + 2)


async def test_priority_and_salt_are_passed_on() -> None:
    client = FakeClient()
    await ask(COMPLETIONS, client, priority=7, cache_salt="tenant")
    assert {(priority, salt) for _, _, priority, salt in client.submitted} == {(7, "tenant")}


async def test_echo() -> None:
    _, answer = await ask(COMPLETIONS, echo=True)
    assert all(choice["text"].startswith("hi") for choice in answer["choices"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"stop": ["x"]}, "stop"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"repetition_detection": {}}, "repetition_detection"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"length_penalty": "long"}, "body.length_penalty"),
        ({"use_beam_search": "perhaps"}, "body.use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2, "n": 1}, "length_penalty"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
async def test_wrong_wishes_are_named(path: str, body: dict[str, Any], param: str) -> None:
    client = FakeClient()
    status, answer = await ask(path, client, **body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert not client.submitted and not client.running


async def test_logprobs_are_not_reported() -> None:
    for path, value in ((COMPLETIONS, 0), (COMPLETIONS, 1), (CHAT, True)):
        status, answer = await ask(path, logprobs=value)
        assert (status, answer["error"]["param"]) == (400, "logprobs")
    assert (await ask(CHAT, logprobs=False))[0] == 200


async def test_what_asks_for_nothing_is_let_through() -> None:
    nothing = {
        "stop": [],
        "bad_words": [],
        "logit_bias": {},
        "presence_penalty": 0,
        "repetition_penalty": 1.0,
    }
    assert (await ask(COMPLETIONS, **nothing))[0] == 200


async def test_the_context_bounds_the_search() -> None:
    status, answer = await ask(COMPLETIONS, prompt=[97] * 250, max_tokens=100, n=1, ignore_eos=True)
    assert status == 200 and len(answer["choices"][0]["token_ids"]) == 6


@pytest.mark.parametrize("prompts", ["hi", ["a", "b"]])
async def test_an_engine_that_fails(prompts: Any) -> None:
    client = FakeClient()
    client.fail_after, client.failure = 0, EngineDeadError("It died.")
    status, answer = await ask(COMPLETIONS, client, prompt=prompts)
    assert (status, answer["error"]["message"]) == (503, "It died.") and not client.running
    client = FakeClient()
    client.capacity = 2  # the second step needs three
    assert (await ask(COMPLETIONS, client))[0] == 503 and not client.running


async def test_a_client_that_leaves_ends_the_search() -> None:
    client = FakeClient()
    client.delay = 0.05
    asked = asyncio.ensure_future(ask(COMPLETIONS, client, max_tokens=200))
    while not client.running:
        await asyncio.sleep(0.01)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await asyncio.sleep(0.01)
    made = client.tokens_made
    assert not client.running
    await asyncio.sleep(0.2)
    assert client.tokens_made == made


async def test_logits_rank_no_beams() -> None:
    client = FakeClient()
    client.config = dataclasses.replace(client.config, logprobs_mode="raw_logits")
    status, answer = await ask("/v1/completions", client, prompt="ab", use_beam_search=True, n=2)
    assert status == 400 and answer["error"]["param"] == "use_beam_search"
