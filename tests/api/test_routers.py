"""What routers ask beside the requests themselves: the load, and a request rendered to token ids."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_client import BOS, FakeClient
from http_tools import in_process
from model_tools import ROOT

from microvllm.openai_compat.app import ENDPOINTS
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import SamplingParams

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "hi"}}


async def render(path: str, /, *, client: FakeClient | None = None, **body: Any) -> tuple[int, Any]:
    client = client or FakeClient()
    async with in_process(client) as http:
        answer = await http.post(f"{path}/render", json={**BODIES[path], **body})
    assert not client.submitted, "rendering must not generate"
    return answer.status_code, answer.json()


async def test_the_load_in_the_engine() -> None:
    client = FakeClient()
    client.stats = EngineStats(
        num_running=3,
        num_waiting=2,
        kv_blocks_used=10,
        kv_blocks_total=64,
        kv_tokens_total=1024,
        kv_unused_slots=7,
        prefix_queries=200,
        prefix_hits=50,
    )
    async with in_process(client) as http:
        loads = (await http.get("/v1/loads?include=core")).json()
        short = (await http.get("/get_load")).json()
    assert loads["dp_rank_count"] == 1 and loads["timestamp"].endswith("+00:00")
    assert loads["loads"] == [
        {
            "dp_rank": 0,
            "num_running_reqs": 3,
            "num_waiting_reqs": 2,
            "num_total_reqs": 5,
            "num_used_tokens": 153,
            "max_total_num_tokens": 1024,
            "max_running_requests": 32,
            "token_usage": 10 / 64,
            "cache_hit_rate": 0.25,
        }
    ]
    assert loads["aggregate"] == {
        "total_running_reqs": 3,
        "total_waiting_reqs": 2,
        "total_reqs": 5,
        "avg_token_usage": 10 / 64,
    }
    assert short == {"load": 5}


async def test_an_idle_engine_has_no_load_and_no_event_sources() -> None:
    async with in_process(FakeClient()) as http:
        loads = (await http.get("/v1/loads")).json()
        assert (await http.get("/kv_event_sources")).json() == {}
    assert loads["loads"][0]["cache_hit_rate"] == 0 and loads["aggregate"]["total_reqs"] == 0


@pytest.mark.parametrize("path", BODIES)
async def test_a_rendered_request_is_the_one_that_runs(path: str) -> None:
    body: dict[str, Any] = {"temperature": 0.5, "stop": "x", "max_tokens": 9, "logit_bias": {"97": 3}, "n": 2}
    status, found = await render(path, **body, request_id="mine", cache_salt="s", priority=4)
    client = FakeClient()
    async with in_process(client) as http:
        await http.post(path, json={**BODIES[path], **body})
    ids, params, _, _ = client.submitted[0]
    one = found[0] if path == COMPLETIONS else found
    assert status == 200 and one["token_ids"] == ids
    sampling = {name: value for name, value in one["sampling_params"].items() if name != "logit_bias"}
    assert sampling["n"] == 2 and sampling["max_tokens"] == 9 and sampling["stop"] == ["x"]
    assert SamplingParams(**sampling, logit_bias={97: 3}) == params
    assert one["request_id"] == ("cmpl-mine" if path == COMPLETIONS else "chatcmpl-mine")
    assert (one["cache_salt"], one["priority"], one["stream"], one["stream_options"]) == ("s", 4, False, None)


async def test_each_prompt_of_a_completion_is_rendered() -> None:
    _, found = await render(COMPLETIONS, prompt=["a", "bc"], request_id="r", model="fake-model")
    assert [one["token_ids"] for one in found] == [[BOS, *b"a"], [BOS, *b"bc"]]
    assert [one["request_id"] for one in found] == ["cmpl-r-0", "cmpl-r-1"]
    assert all(one["model"] == "fake-model" for one in found)


async def test_a_rendered_limit_fits_the_context() -> None:
    _, chat = await render(CHAT)
    assert chat["sampling_params"]["max_tokens"] == 256 - len(chat["token_ids"])
    _, (completion,) = await render(COMPLETIONS, prompt=[97] * 250, max_tokens=100)
    assert completion["sampling_params"]["max_tokens"] == 6


@pytest.mark.parametrize("path", BODIES)
async def test_a_rendered_stream(path: str) -> None:
    options = {"include_usage": True}
    _, found = await render(path, stream=True, stream_options=options)
    one = found[0] if path == COMPLETIONS else found
    assert one["stream"] is True and one["stream_options"]["include_usage"] is True


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"use_beam_search": True, "n": 2}, "use_beam_search", 400),
        ({"model": "other"}, "model", 404),
        ({"temperature": 3}, "temperature", 400),
        ({"max_tokens": 10_000}, "max_tokens", 400),
        ({"logit_bias": {"5000": 1}}, "logit_bias", 400),
        ({"response_format": {"type": "json_schema"}}, "response_format", 400),
    ],
)
async def test_a_wrong_request_is_not_rendered(
    path: str, body: dict[str, Any], param: str, status: int
) -> None:
    got, answer = await render(path, **body)
    assert (got, answer["error"]["param"]) == (status, param)


@pytest.mark.parametrize("prompt", [[97] * 256, [97] * 300, [5000], ""])
async def test_a_prompt_that_cannot_run_is_not_rendered(prompt: Any) -> None:
    got, answer = await render(COMPLETIONS, prompt=prompt)
    assert got == 400 and "error" in answer


TABLE = (ROOT / "docs" / "routers.md").read_text("utf-8").partition("## What routers read")[2]
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")][1:8]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip() for row in ROWS])
async def test_what_a_router_reads_is_there(row: list[str]) -> None:
    """The table of docs/routers.md: paths are served, metrics have values, and what is absent is an error."""
    _, paths, metrics, absent = row
    async with in_process(FakeClient()) as http:
        exposition = (await http.get("/metrics")).text
        for metric in re.findall(r"`(vllm:\w+)`", metrics):
            assert re.search(rf"^{metric}\{{.*\}} [0-9.e+]+$", exposition, re.MULTILINE), metric
        for path in re.findall(r"`(/[^`]*)`", paths):
            route = next(endpoint for endpoint in ENDPOINTS if endpoint.path == path)
            if "GET" in route.methods and route.switch is None:
                assert (await http.get(path)).status_code == 200, path
        for path in re.findall(r"`(/[^`]*)`", absent):
            answer = await http.get(path)
            assert answer.status_code in (400, 404, 405) and "error" in answer.json(), path


async def test_where_events_are_published() -> None:
    client = FakeClient()
    client.event_sources = {
        1: KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", topic="t").at_rank(1)
    }
    async with in_process(client) as http:
        sources = (await http.get("/kv_event_sources")).json()
    assert sources["1"]["endpoint"] == "tcp://*:5558" and sources["1"]["replay_endpoint"] is None
    assert (sources["1"]["buffer_steps"], sources["1"]["hwm"]) == (10_000, 100_000)
