"""What is logged of a request's end, and of probes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process

from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.server import _log_config

pytestmark = pytest.mark.asyncio

BODY = {"prompt": "a secret text", "max_tokens": 5, "request_id": "mine", "temperature": 1.0}


async def ends(caplog: pytest.LogCaptureFixture, client: FakeClient, **fields: Any) -> list[Any]:
    """(level, message) of the lines about the end of one completion."""
    with caplog.at_level(logging.DEBUG, "microvllm.server"):
        async with in_process(client) as http:
            await http.post("/v1/completions", json={**BODY, **fields})
    return [(r.levelno, r.getMessage()) for r in caplog.records if "cmpl-mine ended" in r.getMessage()]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_normal_end_is_one_line_at_debug_level(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    ((level, line),) = await ends(caplog, FakeClient(), stream=stream, n=2)
    assert level == logging.DEBUG
    assert "(length): 2 sequences, 14 prompt tokens, 10 generated, 0 preemptions" in line
    assert "secret" not in line


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_request_is_one_warning(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    client = FakeClient()
    client.fail_after = 2
    ((level, line),) = await ends(caplog, client, stream=stream)
    assert level == logging.WARNING and "ended (error): 1 sequences, 14 prompt tokens, 2 generated" in line


async def test_many_preemptions_are_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient()
    submit = client._start

    def preempted(*args: Any, **options: Any) -> Any:
        streams = submit(*args, **options)
        streams[0].num_preemptions = 4
        return streams

    monkeypatch.setattr(client, "_start", preempted)
    ((level, line),) = await ends(caplog, client)
    assert level == logging.WARNING and "ended (length)" in line and "4 preemptions" in line


async def test_streams_have_the_requests_id_for_the_log_of_an_engines_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = FakeClient()
    submit, streams = client._start, []

    def noted(*args: Any, **options: Any) -> Any:
        streams.extend(submit(*args, **options))
        return streams

    monkeypatch.setattr(client, "_start", noted)
    async with in_process(client) as http:
        await http.post("/v1/completions", json={**BODY, "n": 2})
    assert [stream.name for stream in streams] == ["cmpl-mine"] * 2


@pytest.mark.parametrize(
    ("options", "path", "logged"),
    [
        ({}, "/health", False),
        ({}, "/metrics?x=1", False),
        ({}, "/load", False),
        ({}, "/v1/models", True),
        ({"disable_access_log_for_endpoints": ("/v1/models",)}, "/v1/models", False),
        ({"disable_access_log_for_endpoints": ("/v1/models",)}, "/health", True),
        ({"disable_access_log_for_endpoints": ()}, "/health", True),
    ],
)
async def test_probes_have_no_access_line(options: dict[str, Any], path: str, logged: bool) -> None:
    config = _log_config(ServerArgs(**options))
    quiet = config.get("filters", {}).get("quiet")
    line = logging.LogRecord("uvicorn.access", 20, "", 0, "", ("a", "GET", path, "1.1", 200), None)
    assert logged == (quiet is None or quiet["()"](quiet["paths"]).filter(line))
