"""What a server of several engines says of each, and the header that names one of them."""

from __future__ import annotations

from typing import Any

import pytest
from fake_client import FakeClient, with_engines
from http_tools import in_process

from microvllm.openai_compat.metrics import stats_line
from microvllm.runtime.metrics.stats import EngineStats

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/generate": {"prompt": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/v1/responses": {"input": "hi"},
}


async def test_health_says_which_engine_serves() -> None:
    client = with_engines(2)
    async with in_process(client) as http:
        both = await http.get("/health")
        client.replicas[1].alive = False
        one = await http.get("/health")
        client.alive = False
        none = await http.get("/health")
    assert (both.status_code, both.json()) == (200, {"engines": {"0": "serving", "1": "serving"}})
    assert (one.status_code, one.json()) == (200, {"engines": {"0": "serving", "1": "starting"}})
    assert none.status_code == 503 and none.json()["engines"] == {"0": "starting", "1": "starting"}
    assert none.headers["retry-after"] == "1"


async def test_loads_are_those_of_each_engine_and_their_sum() -> None:
    client = with_engines(2)
    client.replicas[1].stats = EngineStats(num_running=3, num_waiting=2, kv_blocks_used=8, kv_blocks_total=64)
    async with in_process(client) as http:
        found = (await http.get("/v1/loads")).json()
        info = (await http.get("/server_info")).json()
    assert found["dp_rank_count"] == 2
    assert [each["dp_rank"] for each in found["loads"]] == [0, 1]
    assert [each["num_total_reqs"] for each in found["loads"]] == [0, 5]
    assert found["aggregate"]["avg_token_usage"] == 8 / 64 / 2
    assert (info["dp_size"], info["tp_size"], info["max_running_requests"]) == (2, 1, 64)


async def test_each_metric_has_the_number_of_its_engine() -> None:
    client = with_engines(2)
    async with in_process(client) as http:
        await http.post("/v1/completions", json=BODIES["/v1/completions"])
        lines = (await http.get("/metrics")).text.splitlines()
    for name in ("vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:cache_config_info"):
        (first, second) = [line for line in lines if line.startswith(name + "{")]
        assert 'engine="0"' in first and 'engine="1"' in second, name
    counts = [line for line in lines if line.startswith("vllm:e2e_request_latency_seconds_count")]
    assert len(counts) == 2
    assert all("engine=" not in line for line in lines if line.startswith("vllm:admission_rejections"))


def test_the_line_of_statistics_names_the_engine() -> None:
    assert stats_line(EngineStats(), EngineStats(), 1.0, engine=12).startswith("Engine 012: Avg prompt")


@pytest.mark.parametrize("path", BODIES)
async def test_the_header_names_the_engine(path: str) -> None:
    client = with_engines(2)
    async with in_process(client) as http:
        for headers in ({}, {"X-data-parallel-rank": "1"}, {"x-data-parallel-rank": "0"}):
            answer = await http.post(path, json=BODIES[path], headers=headers)
            assert answer.status_code == 200
    assert client.ranks == [None, 1, 0]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("value", ["2", "-1", "x", "", "1.0", "٣", "9" * 5000])
async def test_a_wrong_number_is_refused(path: str, value: str) -> None:
    client = with_engines(2)
    async with in_process(client) as http:
        answer = await http.post(path, json=BODIES[path], headers={"X-data-parallel-rank": value.encode()})
    assert answer.status_code == 400 and "X-data-parallel-rank must be an integer in [0, 1]" in answer.text
    assert not client.submitted


async def test_one_engine_has_the_number_0() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        headers = [{"X-data-parallel-rank": value} for value in ("0", "1")]
        path = "/v1/completions"
        statuses = [(await http.post(path, json=BODIES[path], headers=each)).status_code for each in headers]
        health = await http.get("/health")
    assert statuses == [200, 400] and health.content == b""
