"""What stands in front of the endpoints: path prefix, request ids, CORS, keys, keep-alive, names of hosts."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient, fresh
from http_tools import events, in_process, raw_exchange, real_server, server_lines

import microvllm
from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.metrics.stats import EngineStats

COMPLETION = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
ORIGIN = "https://app.example"


class TestRequestIds:
    async def test_none_unless_asked_for(self) -> None:
        async with in_process(FakeClient()) as http:
            answer = await http.get("/version", headers={"x-request-id": "mine"})
        assert "x-request-id" not in answer.headers

    async def test_every_answer_carries_one(self) -> None:
        client = fresh(fail_after=1)
        async with in_process(client, enable_request_id_headers=True, api_keys=("k",)) as http:
            http.headers["authorization"] = "Bearer k"
            stream = {**COMPLETION, "stream": True}
            answers = [
                await http.get("/health"),
                await http.get("/nowhere"),
                await http.post("/v1/completions", json=stream),
                await http.post("/v1/completions", json={"prompt": 5, "temperature": "hot"}),
                await http.get("/v1/models", headers={"authorization": "Bearer wrong"}),
            ]
        assert [answer.status_code for answer in answers] == [200, 404, 200, 400, 401]
        ids = [answer.headers["x-request-id"] for answer in answers]
        assert len(set(ids)) == 5 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)

    async def test_an_unexpected_error_carries_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        client = FakeClient()
        monkeypatch.setattr(client, "healthy", lambda: 1 / 0)
        options = {"enable_request_id_headers": True, "allowed_origins": (ORIGIN,)}
        async with in_process(client, **options) as http:
            http._transport.raise_app_exceptions = False  # type: ignore[attr-defined]
            answer = await http.get("/health", headers={"x-request-id": "mine", "origin": ORIGIN})
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
        assert answer.headers["access-control-allow-origin"] == ORIGIN

    @pytest.mark.parametrize("wish", ["mine", "a.b_c-1", "x" * 128])
    async def test_a_tame_one_is_repeated(self, wish: str) -> None:
        async with in_process(FakeClient(), enable_request_id_headers=True) as http:
            answer = await http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": wish})
        assert answer.headers["x-request-id"] == wish and answer.json()["id"] == f"cmpl-{wish}"

    @pytest.mark.parametrize("wish", ["", "a b", "x" * 129, "<script>", "é"])
    async def test_others_are_not(self, wish: str) -> None:
        async with in_process(FakeClient(), enable_request_id_headers=True) as http:
            answer = await http.get("/version", headers={"x-request-id": wish.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


class TestCors:
    @pytest.mark.parametrize(
        "origin",
        ["http://localhost:5173", "http://127.0.0.1", "https://localhost:8443", "http://[::1]:3000"],
    )
    async def test_pages_of_this_machine_may_use_it_by_default(self, origin: str) -> None:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization,content-type"
        async with in_process(FakeClient(), api_keys=("k",)) as http:
            asked = await http.options("/v1/chat/completions", headers=headers)
            refused = await http.get("/v1/models", headers={"origin": origin})
        assert (asked.status_code, refused.status_code) == (200, 401)
        for answer in (asked, refused):
            assert answer.headers["access-control-allow-origin"] == origin
            assert "origin" in answer.headers["vary"].lower()

    @pytest.mark.parametrize(
        "origin",
        [ORIGIN, "null", "http://localhost.example", "http://127.0.0.1.example:80", "http://xlocalhost"],
    )
    async def test_other_pages_may_not_by_default(self, origin: str) -> None:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        async with in_process(FakeClient()) as http:
            answer = await http.get("/version", headers={"origin": origin})
            asked = await http.options("/v1/completions", headers=headers)
        assert asked.status_code == 400 and "access-control-allow-origin" not in asked.headers
        assert "access-control-allow-origin" not in answer.headers

    async def test_every_page_may_if_the_operator_says_so(self) -> None:
        async with in_process(FakeClient(), allowed_origins=("*",)) as http:
            answer = await http.get("/version", headers={"origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == "*"

    async def test_an_empty_list_is_off(self) -> None:
        async with in_process(FakeClient(), allowed_origins=()) as http:
            answer = await http.get("/version", headers={"origin": "http://localhost"})
            asked = await http.options(
                "/v1/completions",
                headers={"origin": "http://localhost", "access-control-request-method": "POST"},
            )
        assert "access-control-allow-origin" not in answer.headers
        assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers

    async def test_a_browser_may_ask_without_the_key(self) -> None:
        async with in_process(FakeClient(), allowed_origins=(ORIGIN,), api_keys=("k",)) as http:
            headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
            headers["access-control-request-headers"] = "authorization,content-type"
            asked = await http.options("/v1/completions", headers=headers)
            foreign = await http.options(
                "/v1/completions", headers={**headers, "origin": "https://b.example"}
            )
            refused = await http.post("/v1/completions", json=COMPLETION, headers={"origin": ORIGIN})
            served = await http.post(
                "/v1/completions", json=COMPLETION, headers={"origin": ORIGIN, "authorization": "Bearer k"}
            )
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == ORIGIN
        assert foreign.status_code == 400 and "access-control-allow-origin" not in foreign.headers
        assert refused.status_code == 401 and served.status_code == 200
        for answer in (refused, served):
            assert answer.headers["access-control-allow-origin"] == ORIGIN

    async def test_methods_headers_and_credentials(self) -> None:
        options: Any = {
            "allowed_origins": (ORIGIN,),
            "allowed_methods": ("GET",),
            "allowed_headers": ("x-mine",),
            "allow_credentials": True,
        }
        async with in_process(FakeClient(), **options) as http:
            for method, header, status in (
                ("GET", "x-mine", 200),
                ("POST", "x-mine", 400),
                ("GET", "x-b", 400),
            ):
                asked = {"origin": ORIGIN, "access-control-request-method": method}
                asked["access-control-request-headers"] = header
                answer = await http.options("/v1/models", headers=asked)
                assert answer.status_code == status, (method, header)
            answer = await http.get("/v1/models", headers={"origin": ORIGIN})
        assert answer.headers["access-control-allow-credentials"] == "true"


class TestRootPath:
    @pytest.mark.parametrize("prefix", ["", "/llm"])
    async def test_with_and_without_the_prefix(self, prefix: str) -> None:
        async with in_process(FakeClient(), root_path="/llm") as http:
            assert (await http.get(f"{prefix}/v1/models")).status_code == 200
            assert (await http.post(f"{prefix}/v1/completions", json=COMPLETION)).status_code == 200
            assert (await http.get("/llm")).status_code == 404
            assert (await http.get("/llmv1/models")).status_code == 404

    async def test_a_prefix_is_no_way_around_the_key(self) -> None:
        async with in_process(FakeClient(), root_path="/llm", api_keys=("k",)) as http:
            for path in ("/v1/models", "/llm/v1/models", "/llm/llm/v1/models", "/llm/health/../v1/models"):
                assert (await http.get(path)).status_code == 401, path
            assert (await http.get("/llm/health")).status_code == 200
            answer = await http.get("/llm/v1/models", headers={"authorization": "Bearer k"})
            assert answer.status_code == 200


class TestKeepAlive:
    async def test_a_silent_stream_gets_comments(self) -> None:
        client = fresh(delay=0.25)
        async with in_process(client, sse_keep_alive_interval=0.05) as http:
            answer = await http.post("/v1/completions", json={**COMPLETION, "stream": True})
        frames = answer.text.split("\n\n")
        assert frames.count(": keep-alive") >= 2  # a token takes five times the interval
        rest = "\n\n".join(frame for frame in frames if frame != ": keep-alive")
        assert len(events(rest)) == 3 and frames[-2:] == ["data: [DONE]", ""]

    async def test_only_silence_and_only_streams(self) -> None:
        client = fresh(delay=0.1)
        async with in_process(client, sse_keep_alive_interval=30) as http:
            answer = await http.post("/v1/completions", json={**COMPLETION, "stream": True})
            assert "keep-alive" not in answer.text
        async with in_process(client, sse_keep_alive_interval=0.01) as http:
            answer = await http.post("/v1/completions", json=COMPLETION)
            assert answer.json()["choices"] and "keep-alive" not in answer.text
        assert not [task for task in asyncio.all_tasks() if "_comment" in repr(task)]


class TestKeys:
    @pytest.mark.parametrize("key", ["one", "two"])
    async def test_each_of_several(self, key: str) -> None:
        async with in_process(FakeClient(), api_keys=("one", "two")) as http:
            good = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            bad = await http.get("/v1/models", headers={"authorization": f"Bearer {key}x"})
        assert (good.status_code, bad.status_code) == (200, 401)
        assert bad.json() == {"error": "Unauthorized"}

    async def test_what_is_open(self) -> None:
        options: Any = {"dev_mode": True, "enable_tokenizer_info_endpoint": True}
        async with in_process(FakeClient(), api_keys=("k",), **options) as http:
            for path in ("/health", "/ping", "/version", "/metrics", "/load", "/docs", "/openapi.json"):
                assert (await http.get(path)).status_code == 200, path
            for path in ("/ready", "/get_load"):
                assert (await http.get(path)).status_code == 200, path
            for path in ("/v1/models", "/v1/loads", "/server_info", "/is_sleeping", "/tokenizer_info"):
                assert (await http.get(path)).status_code == 401, path
            assert (await http.post("/reset_prefix_cache")).status_code == 401


class TestAdmin:
    async def test_switched_off_unless_asked_for(self) -> None:
        async with in_process(FakeClient()) as http:
            answers = [await http.get(p) for p in ("/is_sleeping", "/tokenizer_info")]
            answers.append(await http.post("/reset_prefix_cache"))
        assert all(answer.status_code == 400 and set(answer.json()) == {"error"} for answer in answers)

    async def test_server_info_without_developer_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A router's questions are answered; the environment is nobody's business."""
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        client = FakeClient()
        client.stats = EngineStats(kv_blocks_total=64, kv_tokens_total=1024)
        async with in_process(client, served_model_names=("a", "b")) as http:
            answer = await http.get("/server_info")
            assert (await http.get("/get_server_info")).json() == answer.json()
        assert answer.json() == {
            "version": microvllm.__version__,
            "served_model_name": "a",
            "context_length": 256,
            "max_running_requests": 32,
            "max_total_num_tokens": 1024,
            "page_size": 16,
            "block_size": 16,
            "dtype": "float32",
            "tp_size": 1,
            "dp_size": 1,
        }

    async def test_server_info(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        async with in_process(FakeClient(), dev_mode=True) as http:
            text = await http.get("/server_info")
            form = await http.get("/server_info?config_format=json")
            bad = await http.get("/server_info?config_format=xml")
        assert "max_model_len=256" in text.json()["vllm_config"]
        assert form.json()["vllm_config"]["max_model_len"] == 256
        assert form.json()["vllm_env"]["VLLM_LOGGING_LEVEL"] == "INFO" and "secret" not in form.text
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "query.config_format"

    async def test_reset_prefix_cache(self) -> None:
        client = FakeClient()
        async with in_process(client, dev_mode=True) as http:
            answer = await http.post("/reset_prefix_cache?reset_running_requests=true&reset_external=0")
            bad = await http.post("/reset_prefix_cache?reset_external=maybe")
            assert client.resets == 1
            client.alive = False
            dead = await http.post("/reset_prefix_cache")
            assert (await http.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert answer.json() == {"success": True}
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "query.reset_external"
        assert dead.status_code == 503 and client.resets == 1

    async def test_tokenizer_info(self, tmp_path: Path) -> None:
        settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "name_or_path": "/home/x"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
        client = FakeClient()
        async with in_process(client, enable_tokenizer_info_endpoint=True, chat_template="{{ 1 }}") as http:
            plain = (await http.get("/tokenizer_info")).json()
            object.__setattr__(client.config, "tokenizer_path", str(tmp_path))
            stored = (await http.get("/tokenizer_info")).json()
        assert plain["chat_template"] == "{{ 1 }}" and plain["eos_token"] == "</s>"
        assert stored["tokenizer_class"] == "GPT2Tokenizer" and "name_or_path" not in stored


class TestFingerprint:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, r"microvllm-\d+\.\d+\.\d+-[0-9a-f]{8}"),
            ({"fingerprint_mode": "hash"}, r"microvllm-\d+\.\d+\.\d+-[0-9a-f]{8}"),
            ({"fingerprint_mode": "custom", "fingerprint_value": "blue"}, "blue"),
            ({"fingerprint_mode": "none"}, None),
        ],
    )
    async def test_modes(self, options: Any, expected: str | None) -> None:
        async with in_process(FakeClient(), **options) as http:
            whole = (await http.post("/v1/completions", json=COMPLETION)).json()
            chunks = events((await http.post("/v1/completions", json={**COMPLETION, "stream": True})).text)
        for found in (whole["system_fingerprint"], chunks[-1].get("system_fingerprint")):
            assert found is None if expected is None else re.fullmatch(expected, found)


async def test_requests_are_logged_without_their_text(caplog: pytest.LogCaptureFixture) -> None:
    body = {**COMPLETION, "prompt": "a secret", "temperature": 0.5, "request_id": "mine"}
    for logging_on in (False, True):
        with caplog.at_level(logging.INFO, logger="microvllm.server"):
            async with in_process(FakeClient(), enable_log_requests=logging_on) as http:
                assert (await http.post("/v1/completions", json=body)).status_code == 200
    lines = [record.getMessage() for record in caplog.records if record.name == "microvllm.server"]
    (line,) = [line for line in lines if "cmpl-mine" in line]
    assert "'temperature': 0.5" in line and "secret" not in line and "\n" not in line


def test_access_lines_of_some_paths_are_dropped() -> None:
    quiet = server.QuietPaths(frozenset({"/health", "/metrics"}))

    def shown(path: str) -> bool:
        arguments = ("127.0.0.1:1", "GET", path, "1.1", 200)
        line = '%s - "%s %s HTTP/%s" %d'
        return quiet.filter(logging.LogRecord("uvicorn.access", logging.INFO, "", 0, line, arguments, None))

    assert not shown("/health") and not shown("/metrics?x=1")
    assert shown("/v1/models") and shown("/healthy")


def test_lines_that_anyone_can_provoke_are_few() -> None:
    seldom = server.SeldomLines()

    def logged(at: float, message: str = server.PROVOKED_LINES[0]) -> str | None:
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, message, None, None)
        record.created = at
        return record.getMessage() if seldom.filter(record) else None

    first, second = server.PROVOKED_LINES
    assert logged(1000) == first and logged(1000, second) == second
    assert all(logged(1000 + i / 1000) is None for i in range(500))
    assert logged(1059.9) is None and logged(1059.9, "another") == logged(1060, "another") == "another"
    assert logged(1060) == f"{first} (501 more since the last line of this)"
    assert logged(900) == first  # the clock was set back
    assert server._log_config(ServerArgs())["loggers"]["uvicorn.error"]["filters"] == ["seldom"]


def test_a_malformed_request_is_one_of_those_lines(caplog: pytest.LogCaptureFixture) -> None:
    with real_server(FakeClient()) as port, server_lines(caplog) as lines:
        raw_exchange(port, b"no request\r\n\r\n")
        (line,) = [record.msg for record in lines if record.levelno >= logging.WARNING]
    assert line in server.PROVOKED_LINES


LOCAL_HOSTS = [
    "localhost",
    "LOCALHOST:8000",
    "a.localhost",
    "127.0.0.1:80",
    "127.9.9.9",
    "[::1]:8000",
    "localhost.",
]
FOREIGN_HOSTS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "10.0.0.1",
    "[::2]",
    "",
    "::1x",
]


async def status_for(header: str, *, allowed_hosts: tuple[str, ...] | None = None, **args: Any) -> int:
    async with in_process(FakeClient(), allowed_hosts=allowed_hosts, **args) as http:
        answer = await http.get("/v1/models", headers={"host": header, "authorization": "Bearer k"})
    if answer.status_code == 403:
        assert "--allowed-hosts" in answer.json()["error"]["message"]
    return answer.status_code


@pytest.mark.parametrize("host", LOCAL_HOSTS)
async def test_names_of_this_machine_are_served(host: str) -> None:
    assert await status_for(host) == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_a_rebound_name_is_refused(host: str) -> None:
    """Without a key on loopback only: elsewhere clients use names that nobody told the server."""
    assert await status_for(host) == 403
    assert await status_for(host, host="localhost") == 403
    assert await status_for(host, host="0.0.0.0") == 200
    assert await status_for(host, api_keys=("k",)) == 200
    assert await status_for(host, uds="/tmp/x") == 200


async def test_allowed_hosts_are_served_and_no_others() -> None:
    names = ("llm.example", "other.example")
    servers: list[dict[str, Any]] = [{}, {"host": "0.0.0.0"}, {"api_keys": ("k",)}]
    for options in servers:
        assert await status_for("LLM.example:8000", allowed_hosts=names, **options) == 200
        assert await status_for("localhost", allowed_hosts=names, **options) == 200
        assert await status_for("evil.example", allowed_hosts=names, **options) == 403
    assert await status_for("evil.example", allowed_hosts=("*",)) == 200
