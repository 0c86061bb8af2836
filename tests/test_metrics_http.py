"""What /metrics counts of HTTP, who may read it, and what /load says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import prometheus_client
import pytest
from fake_client import FakeClient, fresh
from http_tools import in_process
from metrics_case import GENERATE, scrape, wish
from process_tools import wait_until_async

from microvllm.openai_compat.app import ENDPOINTS
from microvllm.runtime.metrics.stats import EngineStats


async def test_http_requests_are_counted_by_handler_method_and_status() -> None:
    async with in_process(FakeClient(), api_keys=("k",)) as http:
        key = {"authorization": "Bearer k"}
        for body in (wish("hi", 3, model=None), wish("hi", 3, model=None, stream=True), {"prompt": 3.5}):
            await http.post(GENERATE, json=body, headers=key)
        await http.post(GENERATE, json={}, headers={"authorization": "Bearer wrong"})
        await http.get(GENERATE, headers=key)
        await http.get("/v1/models", headers=key)
        for path in ("/no/such/path", "/another"):
            await http.get(path, headers=key)
        for path in (endpoint.path for endpoint in ENDPOINTS if not endpoint.in_http_metrics):
            await http.get(path, headers=key)
        now = await scrape(http)
    counted = {
        (s.labels["handler"], s.labels["method"], s.labels["status"]): s.value
        for s in now.samples
        if s.name == "http_requests_total"
    }
    assert counted == {
        (GENERATE, "POST", "2xx"): 2,
        (GENERATE, "POST", "4xx"): 2,
        (GENERATE, "GET", "4xx"): 1,
        ("/v1/models", "GET", "2xx"): 1,
        ("none", "GET", "4xx"): 2,
    }
    assert now("http_request_duration_seconds_count", handler=GENERATE, method="POST") == 4
    assert now("http_request_duration_highr_seconds_count") == 8
    assert now("http_request_size_bytes_count", handler=GENERATE) == 5
    assert now("http_request_size_bytes_sum", handler=GENERATE) > 20
    assert now("http_response_size_bytes_sum", handler="/v1/models") > 20


async def test_an_unexpected_failure_is_a_5xx(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(client, "_start", broken)
    async with in_process(client) as http:
        with pytest.raises(ZeroDivisionError):  # httpx shows what the server only logs
            await http.post(GENERATE, json=wish("hi", 3, model=None))
        now = await scrape(http)
    assert now("http_requests_total", handler=GENERATE, status="5xx") == 1


async def test_metrics_with_and_without_a_slash_and_without_a_key() -> None:
    async with in_process(FakeClient(), api_keys=("k",)) as http:
        for path in ("/metrics", "/metrics/"):
            assert "vllm:num_requests_running" in (await scrape(http, path)).names


async def test_samples_can_be_chosen_by_name() -> None:
    chosen = "vllm:num_requests_running", "vllm:e2e_request_latency_seconds_count", "http_requests_total"
    async with in_process(FakeClient()) as http:
        await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        whole = (await http.get("/metrics")).text.splitlines()
        some = (await http.get("/metrics", params={"name[]": chosen})).text.splitlines()
        assert (await http.get("/metrics?name[]=nothing")).text == ""
    assert [line for line in some if line[0] != "#"] == [line for line in whole if line.startswith(chosen)]
    assert len(some) == 3 * 3


async def test_without_log_stats_only_the_engines_numbers_are_off() -> None:
    client = FakeClient()
    before = client.replicas[0].observer
    async with in_process(client, disable_log_stats=True) as http:
        await http.post(GENERATE, json=wish("hi", 3, model=None))
        now = await scrape(http)
    assert client.replicas[0].observer is before
    assert not [name for name in now.names if name.startswith(("vllm:", "microvllm:"))]
    assert now("http_requests_total") == 1
    assert "process_resident_memory_bytes" in now.names


async def test_two_servers_in_one_process_count_apart() -> None:
    async with in_process(FakeClient()) as one, in_process(FakeClient()) as other:
        await one.post(GENERATE, json=wish("hi", 3, model=None))
        assert (await scrape(one))("http_request_duration_highr_seconds_count") == 1
        assert (await scrape(other))("http_request_duration_highr_seconds_count") == 0
    registered = prometheus_client.generate_latest().decode()
    assert "vllm:" not in registered and "http_requests" not in registered


def test_prometheus_is_not_imported_to_start() -> None:
    program = "import sys, microvllm.openai_compat.server; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False).returncode == 0


@pytest.mark.parametrize("tracked", [True, False])
async def test_load_is_the_number_of_generations_in_progress(tracked: bool) -> None:
    async with in_process(fresh(stall_after=1), enable_server_load_tracking=tracked) as http:

        async def load() -> Any:
            return (await http.get("/load")).json()

        assert await load() == {"server_load": 0}
        bodies = [wish("hi", 3, model=None), wish("hi", 3, model=None, stream=True)]
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        tasks = [asyncio.ensure_future(http.post(GENERATE, json=body)) for body in bodies]
        tasks.append(asyncio.ensure_future(http.post("/v1/chat/completions", json=chat)))
        app = http._transport.app  # type: ignore[attr-defined]
        state = app.state.server
        await wait_until_async(lambda: state.num_generations == 3, "all are in progress")
        assert (await http.post("/tokenize", json={"prompt": "hi"})).status_code == 200
        assert await load() == {"server_load": 3 if tracked else 0}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await wait_until_async(lambda: state.num_generations == 0, "none is in progress")
        assert await load() == {"server_load": 0}


@pytest.mark.parametrize(
    ("form", "report"),
    [
        ("TEXT", "TEXT named_metrics.num_requests_waiting=3.0, named_metrics.kv_cache_usage_perc=0.25"),
        ("json", 'JSON {"named_metrics":{"num_requests_waiting":3.0,"kv_cache_usage_perc":0.25}}'),
        ("XML", None),
        (None, None),
    ],
)
async def test_the_load_in_a_response_header(form: str | None, report: str | None) -> None:
    class Loaded(FakeClient):
        stats = property(  # type: ignore[assignment]
            lambda self: EngineStats(num_waiting=3, kv_blocks_used=1, kv_blocks_total=4), lambda self, _: None
        )

    headers = {} if form is None else {"endpoint-load-metrics-format": form}
    async with in_process(Loaded()) as http:
        for path, body in (
            (GENERATE, wish("hi", 3, model=None)),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
        ):
            whole = await http.post(path, json=body, headers=headers)
            assert whole.status_code == 200
            assert whole.headers.get("endpoint-load-metrics") == report
            for other in ({**body, "stream": True}, {**body, "max_tokens": -1}):
                answer = await http.post(path, json=other, headers=headers)
                assert "endpoint-load-metrics" not in answer.headers
