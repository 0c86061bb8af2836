"""The routes of a server that may sleep: which servers have them, what they take, what they do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process

SLEEPS: dict[str, Any] = {"dev_mode": True, "enable_sleep_mode": True}
PATHS = ("/v1/completions", "/v1/chat/completions", "/generate", "/v1/messages", "/v1/responses")


@pytest.mark.parametrize("args", [{}, {"dev_mode": True}, {"enable_sleep_mode": True}])
@pytest.mark.parametrize("path", ["/sleep", "/wake_up"])
async def test_both_switches_are_needed(args: dict[str, Any], path: str) -> None:
    client = FakeClient()
    async with in_process(client, **args) as http:
        answer = await http.post(path)
    assert answer.status_code == 400 and not client.slept
    message = answer.json()["error"]["message"]
    assert "--enable-sleep-mode" in message and "VLLM_SERVER_DEV_MODE" in message


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", (1, False)),
        ("?level=2", (2, False)),
        ("?level=1&mode=wait", (1, True)),
        ("?mode=abort", (1, False)),
    ],
)
async def test_a_server_is_put_to_sleep_and_woken(query: str, asked: tuple[int, bool]) -> None:
    client = FakeClient()
    async with in_process(client, **SLEEPS) as http:
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await http.post(f"/sleep{query}")).status_code == 200
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/wake_up")).status_code == 200
        assert (await http.post("/wake_up?tags=kv_cache&tags=weights")).status_code == 200
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": False}
    assert client.slept == [asked, ["weights", "kv_cache"], ["kv_cache", "weights"]]


@pytest.mark.parametrize("path", PATHS)
async def test_requests_are_refused_meanwhile(path: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a"}
    body["max_tokens"] = 4
    body = {"input": "a"} if path.endswith("responses") else body
    client = FakeClient()
    async with in_process(client, **SLEEPS) as http:
        await http.post("/sleep")
        answer = await http.post(path, json=body)
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200
    assert answer.status_code == 503 and "asleep: POST /wake_up" in answer.text


@pytest.mark.parametrize(
    ("path", "param"),
    [
        *[(f"/sleep?level={level}", "level") for level in ("0", "3", "x", "", "1.0")],
        *[(f"/sleep?mode={mode}", "mode") for mode in ("keep", "now", "")],
        *[(f"/wake_up?tags={tag}", "tags") for tag in ("scheduling", "all", "")],
    ],
)
async def test_what_there_is_not_is_named(path: str, param: str) -> None:
    client = FakeClient()
    async with in_process(client, **SLEEPS) as http:
        answer = await http.post(path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param) and not client.slept


async def test_several_ranks_do_not_keep_their_weights() -> None:
    client = FakeClient()
    client.config = dataclasses.replace(client.config, tensor_parallel_size=2)
    async with in_process(client, **SLEEPS) as http:
        first, second = [await http.post(f"/sleep?level={level}") for level in (1, 2)]
    assert first.status_code == 400 and "--tensor-parallel-size 2; level 2 is" in first.text
    assert second.status_code == 200 and client.slept == [(2, False)]
