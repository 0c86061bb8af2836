"""Error bodies: JSON that is not JSON, prompts and messages of the wrong shape, keys, a failing engine."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from typing import Any

import httpx
import pytest
from fake_client import VOCAB_SIZE, FakeClient, fresh
from http_tools import in_process
from process_tools import PATIENCE_S

from microvllm.openai_compat.api import prompts
from microvllm.openai_compat.api.absent import NOT_IMPLEMENTED
from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.transport import body as body_module
from microvllm.runtime.errors import ConfigError, EngineBusyError, EngineDeadError

JSON = {"content-type": "application/json"}
PROMPT = b'{"prompt": "hi"}'


async def post(path: str, body: Any, client: FakeClient | None = None, **args: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with in_process(client or FakeClient(), **args) as http:
        return await http.post(path, content=content, headers=JSON)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == answer.status_code and len(error["message"]) < 1500
    return dict(error)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", "body.0"),
        (b"{", "body.1"),
        (b'{"prompt": "hi",}', "body.15"),
        (b'{"temperature": NaN}', "body.16"),
        (b'{"temperature": Infinity}', "body.16"),
        (b'{"prompt": "\\ud800"}', None),
        (b"\xef\xbb\xbf{}", None),
        ('{"prompt": "hi"}'.encode("utf-16"), None),
        (b'{"prompt": "\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"prompt":' * 2000 + b"1" + b"}" * 2000, None),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"x"', "body"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"]
)
async def test_bodies_that_are_no_json_object(path: str, content: bytes, param: str | None) -> None:
    answer = await post(path, content)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (400, "Bad Request")
    assert re.fullmatch(r"body\S*: .+\.", error["message"])
    assert error["param"].startswith("body") and param in (None, error["param"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_a_body_in_another_encoding_is_called_that(encoding: str) -> None:
    answer = await post("/v1/completions", '{"prompt": "hi"}'.encode(encoding))
    said = "UTF-8 byte order mark" if encoding == "utf-8-sig" else "not UTF-8, but UTF-16 or UTF-32"
    assert answer.status_code == 400 and said in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["gzip"], 415),
        (["GZip"], 415),
        (["identity", "br"], 415),
        (["identity, deflate"], 415),
        (["zstd" * 100], 415),
        (["identity"], 200),
        (["", " Identity , identity"], 200),
        (["UTF-8"], 200),
    ],
)
async def test_compressed_bodies_are_refused_by_the_name_of_the_header(
    headers: list[str], status: int
) -> None:
    content = PROMPT if status == 200 else gzip.compress(PROMPT)
    given = [("content-type", "application/json"), *(("content-encoding", value) for value in headers)]
    async with in_process(FakeClient()) as http:
        answer = await http.post("/v1/completions", content=content, headers=given)
    assert answer.status_code == status
    if status == 415:
        assert error_of(answer)["message"].startswith("Content-Encoding: ")
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("depth", [100, 500, 1000])
@pytest.mark.parametrize("field", ["prompt", "messages", "unknown", "stop", "logit_bias", "tools"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_deep_nesting_is_refused_and_never_printed(path: str, field: str, depth: int) -> None:
    for opened, closed in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")):
        content = b'{"prompt": "hi", "%s": %s1%s}' % (field.encode(), opened * depth, closed * depth)
        error = error_of(await post(path, content))
        assert (error["code"], error["type"]) == (400, "Bad Request")
        assert error["param"].startswith("body") and len(error["message"]) < 200


async def test_brackets_in_text_and_flat_lists_are_not_nesting() -> None:
    body = {"prompt": "[{" * 100, "unknown": [[]] * 1000, "metadata": [[[{}]]] * 200}
    assert (await post("/v1/completions", body)).status_code == 200


UNITS = body_module.MAX_PARSE_UNITS


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        (b"[" + b"[]," * (UNITS // 5 - 20) + b"1]", True),
        (b"[" + b"[]," * (UNITS // 5 + 20) + b"1]", False),
        (b"[" + b"{}," * (UNITS // 5 + 20) + b"1]", False),
        (b"[" + b"1," * (UNITS - 100) + b"1]", True),
        (b"[" + b"1," * (UNITS + 100) + b"1]", False),
        (b"[" + b'"a",' * (UNITS // 7 - 20) + b"1]", True),
        (b"[" + b'"a",' * (UNITS // 7 + 20) + b"1]", False),
        (b"{" + b",".join(b'"%d":1' % i for i in range(UNITS // 7 + 20)) + b"}", False),
        # What is text is no structure, however it is quoted.
        (b'"' + b"[{,:}]" * UNITS + b'"', True),
        (b'"' + rb"\n\", [{," * UNITS + b'"', True),
        (b'"' + rb"\\" * UNITS + rb"\"[" + b'"', True),
        (b'["' + rb"\\" + b'",' + b'"[","a",' * UNITS + b"1]", False),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("limit", [16 << 20])
async def test_the_work_of_parsing_is_bounded(content: bytes, fits: bool, limit: int) -> None:
    body = b'{"prompt": "hi", "max_tokens": 1, "unknown": ' + content + b"}"
    answer = await post("/v1/completions", body, max_body_bytes=limit)
    assert answer.status_code == (200 if fits else 400)
    if not fits:
        error = error_of(answer)
        assert (error["param"], error["type"]) == ("body", "Bad Request")
        assert "too many values" in error["message"]


async def test_a_large_body_is_parsed_in_a_worker() -> None:
    threads: list[str] = []

    class Client(FakeClient):
        async def run_blocking(self, fn: Any, *args: Any) -> Any:
            threads.append(fn.__name__)
            return await super().run_blocking(fn, *args)

    for size, expected in ((10, False), (body_module.INLINE_BYTES, True)):
        threads.clear()
        answer = await post("/v1/completions", {"prompt": "hi", "user": "x" * size}, Client())
        assert answer.status_code == 200 and ("parse_object" in threads) is expected


async def test_number_that_overflows_is_refused() -> None:
    answer = await post("/v1/completions", b'{"prompt": "hi", "temperature": 1e999}')
    assert answer.status_code == 400


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "", None])
async def test_content_type(media_type: str | None) -> None:
    async with in_process(FakeClient()) as http:
        headers = {} if media_type is None else {"content-type": media_type}
        answer = await http.post("/v1/completions", content=b'{"prompt": "hi"}', headers=headers)
        allowed = await http.post(
            "/v1/completions",
            content=b'{"prompt": "hi"}',
            headers={"content-type": "Application/JSON; charset=utf-8"},
        )
    assert answer.status_code == 400
    assert "Only 'application/json' is allowed" in error_of(answer)["message"]
    assert allowed.status_code == 200


async def test_body_limit() -> None:
    fitting = json.dumps({"prompt": "hi", "user": "x" * 500}).encode()
    assert (await post("/v1/completions", fitting, max_body_bytes=len(fitting))).status_code == 200
    answer = await post("/v1/completions", fitting, max_body_bytes=len(fitting) - 1)
    assert answer.status_code == 413 and error_of(answer)["type"] == "PayloadTooLargeError"


async def test_body_limit_without_a_length() -> None:
    async def long() -> Any:
        for _ in range(1000):
            yield b" " * 1000

    async with in_process(FakeClient(), max_body_bytes=10_000) as http:
        answer = await http.post("/v1/completions", content=long(), headers=JSON)
    assert answer.status_code == 413


async def test_body_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def drip() -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    monkeypatch.setattr(body_module, "BODY_DEADLINE_S", 0.1)
    async with in_process(FakeClient()) as http:
        answer = await http.post("/v1/completions", content=drip(), headers=JSON)
    assert answer.status_code == 408


async def test_the_memory_of_unfinished_bodies_is_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slow uploads, each within the limit, must not add up; small requests go on meanwhile."""
    monkeypatch.setattr(body_module, "BODY_DEADLINE_S", 3000.0)
    finish = asyncio.Event()
    started = 0

    async def half() -> Any:
        nonlocal started
        yield b'{"prompt": "hi", "max_tokens": 1'
        for _ in range(9):
            yield b" " * 100_000
        started += 1
        await finish.wait()
        yield b"}"

    async with in_process(FakeClient(), max_body_bytes=1_000_000) as http:
        uploads = [
            asyncio.ensure_future(http.post("/v1/completions", content=half(), headers=JSON))
            for _ in range(40)
        ]
        while started + sum(upload.done() for upload in uploads) < len(uploads):
            await asyncio.sleep(0.01)
        small = await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1})
        finish.set()
        answers = await asyncio.gather(*uploads)
        refused = [answer for answer in answers if answer.status_code == 503]
        assert small.status_code == 200
        assert 8 <= len(answers) - len(refused) <= 10
        assert "bodies" in refused[0].json()["error"]["message"]
        assert refused[0].headers["connection"] == "close" and refused[0].headers["retry-after"]
        again = await asyncio.gather(
            *(http.post("/v1/completions", content=half(), headers=JSON) for _ in range(8))
        )
        assert {answer.status_code for answer in again} == {200}, "memory was not given back"


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt"),
        (["a", ""], "prompt"),
        ([[]], "prompt"),
        (5, "body.prompt"),
        (True, "body.prompt"),
        ({}, "body.prompt"),
        ([True], "body.prompt"),
        (["a", [1]], "body.prompt"),
        ([1, "a"], "body.prompt"),
        ([[1, 1.5]], "body.prompt"),
        ([[[1]]], "body.prompt"),
        ([-1], "body.prompt"),
        ([[1], [-1]], "body.prompt"),
        ([VOCAB_SIZE], "prompt"),
        ([2**31], "prompt"),
        ([2**63], "prompt"),
        ([1] * 257, "input_tokens"),
        ([1] * 256, "max_tokens"),
        ([1] * 100_000, "input_tokens"),
        ([1] * 1_000_000, "body.prompt"),
        ("a" * 1_000_000, "input_text"),
        ("a" * 300, "input_tokens"),
        (["a"] * 1025, "prompt"),
    ],
)
async def test_prompts(prompt: Any, param: str) -> None:
    client = FakeClient()
    answer = await post("/v1/completions", {"prompt": prompt}, client)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert not client.submitted


async def test_missing_prompt() -> None:
    error = error_of(await post("/v1/completions", {}))
    assert error["param"] == "prompt" and error["type"] == "BadRequestError"


async def test_many_prompts_times_n() -> None:
    answer = await post("/v1/completions", {"prompt": ["a"] * 1000, "n": 100})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")


async def test_many_tokens_times_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_TOKENS", 100)
    body = {"prompt": ["a" * 9] * 5, "echo": True}
    assert (await post("/v1/completions", {**body, "n": 2})).status_code == 200
    answer = await post("/v1/completions", {**body, "n": 3})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")


async def test_several_greedy_samples_are_refused() -> None:
    answer = await post("/v1/completions", {"prompt": "a", "n": 2, "temperature": 0})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "n")
    assert error_of(answer)["message"] == "n must be 1 when using greedy sampling, got 2."


async def test_nul_is_legal_text() -> None:
    assert (await post("/v1/completions", {"prompt": "a\x00b"})).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        None,
        {},
        "x",
        5,
        [],
        ["x"],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": {}}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": 5, "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": "x", "name": 5}],
        [{"role": "assistant", "content": "x", "tool_calls": "x"}],
        [{"role": "user", "content": "x"}] * 100_000,
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_messages(path: str, messages: Any) -> None:
    answer = await post(path, {"messages": messages})
    assert answer.status_code == 400
    wanted = ("body.messages", "messages") if messages is not None or "chat" in path else ("body.prompt",)
    assert error_of(answer)["param"] in wanted


async def test_missing_messages() -> None:
    error = error_of(await post("/v1/chat/completions", {"model": "fake-model"}))
    assert (error["param"], error["message"]) == ("body.messages", "messages: Field required.")


async def test_every_wrong_field_is_listed() -> None:
    error = error_of(await post("/v1/completions", {"n": "x", "seed": [], "stop": {}}))
    assert re.fullmatch(r"n: \S[^.]+\. seed: \S[^.]+\. stop: \S[^.]+\.", error["message"])


@pytest.mark.parametrize("model", ["other", "../../etc/passwd", "x" * 10_000, "fake-model\r\nevil: 1"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"]
)
async def test_unknown_model(path: str, model: str) -> None:
    body = {"model": model, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "tokens": [1]}
    answer = await post(path, body)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (404, "NotFoundError", "model")
    assert "does not exist. Valid aliases: fake-model." in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize("model", [None, "", "fake-model"])
async def test_served_model(model: str | None) -> None:
    assert (await post("/v1/completions", {"model": model, "prompt": "hi"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "body.prompt"),
        ("/tokenize", {"prompt": None}, "body.prompt"),
        ("/tokenize", {"prompt": 1}, "body.prompt"),
        ("/tokenize", {"prompt": []}, "body.prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "body.prompt"),
        ("/tokenize", {"prompt": "x" * 5_000_000}, "input_text"),
        (
            "/tokenize",
            {"prompt": "x", "chat_template_kwargs": {"tokenize": False}},
            "body.chat_template_kwargs",
        ),
        ("/tokenize", {"prompt": "x", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "x", "tools": []}, "body.tools"),
        ("/detokenize", {}, "body.tokens"),
        ("/detokenize", {"tokens": None}, "body.tokens"),
        ("/detokenize", {"tokens": "x"}, "body.tokens"),
        ("/detokenize", {"tokens": [-1]}, "body.tokens"),
        ("/detokenize", {"tokens": [1.5]}, "body.tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "body.tokens"),
        ("/detokenize", {"tokens": [1] * 100_000}, "tokens"),
        ("/detokenize", {"tokens": [1] * 1_000_000}, "body.tokens"),
    ],
)
async def test_tokenize_inputs(path: str, body: dict[str, Any], param: str) -> None:
    answer = await post(path, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_by_the_engine_is_an_ordinary_error(stream: bool) -> None:
    answer = await post("/v1/completions", {"prompt": "hi", "stream": stream}, fresh(busy=True))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert error_of(answer)["type"] == EngineBusyError.kind == "Service Unavailable"
    answer = await post("/v1/completions", {"prompt": "hi", "stream": stream}, fresh(alive=False))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


async def test_other_requests_get_in_between_many_prompts() -> None:
    client = FakeClient()
    async with in_process(client) as http:
        many = asyncio.ensure_future(
            http.post("/v1/completions", json={"prompt": ["hi"] * 200, "max_tokens": 1})
        )
        while not client.submitted:
            await asyncio.sleep(0)
        assert (await http.get("/health")).status_code == 200
        assert len(client.submitted) < 200
        assert len((await many).json()["choices"]) == 200


async def test_prompts_before_a_refused_one_are_aborted() -> None:
    client = FakeClient()
    client.capacity = 2
    answer = await post("/v1/completions", {"prompt": ["a", "b", "c"]}, client)
    assert answer.status_code == 503 and client.aborted == 2 and not client.running


@pytest.mark.parametrize(("failure", "status"), [(None, 500), (EngineDeadError("It died."), 503)])
@pytest.mark.parametrize("n", [1, 3])
async def test_failure_in_the_middle(failure: Any, status: int, n: int) -> None:
    client = fresh(fail_after=2)
    client.failure = failure or client.failure
    body = {"prompt": "hi", "ignore_eos": True, "n": n, "max_tokens": 8}
    answer = await post("/v1/completions", body, client)
    assert answer.status_code == status and error_of(answer)["message"] == str(client.failure)
    streamed = await post("/v1/completions", {**body, "stream": True}, client)
    assert streamed.status_code == 200 and not client.running
    *chunks, error, done, nothing = streamed.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "") and len(chunks) >= 2
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {"message": str(client.failure), "type": client.failure.kind, "param": None, "code": status}
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_still_tokenised_when_the_server_stops(stream: bool) -> None:
    client = fresh(stall_after=0)
    app = create_app(client, ServerArgs())  # type: ignore[arg-type]

    async def stop_then_run(function: Any, *args: Any) -> Any:
        app.state.server.lifecycle.cut()
        return function(*args)

    client.run_blocking = stop_then_run  # type: ignore[method-assign]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        asked = http.post("/v1/completions", json={"prompt": "hi", "stream": stream})
        answer = await asyncio.wait_for(asked, PATIENCE_S)
        assert answer.status_code == (200 if stream else 503)
        assert '"error":{"message":"The server is shutting down."' in answer.text
        assert client.aborted == 1 and not client.running
        assert (await http.post("/v1/completions", json={"prompt": "hi"})).status_code == 503
        assert (await http.get("/health")).status_code == 503


@pytest.mark.parametrize("n", [1, 3])
async def test_a_bug_in_the_middle_of_a_stream_is_an_event(n: int) -> None:
    client = fresh(fail_after=2)
    client.failure = ZeroDivisionError("secret")  # type: ignore[assignment]
    answer = await post("/v1/completions", {"prompt": "hi", "n": n, "stream": True}, client)
    assert '"error":{"message":"Internal server error.","type":"InternalServerError"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") and "secret" not in answer.text and not client.running


async def test_the_methods_of_a_path_stand_in_one_order() -> None:
    async with in_process(FakeClient()) as http:
        answer = await http.delete("/v1/models")
    assert "/v1/models takes GET, HEAD, not DELETE." in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/v1/nonexistent", 404, "NotFoundError"),
        ("GET", "/nowhere", 404, "NotFoundError"),
        ("POST", "//v1/completions", 404, "NotFoundError"),
        ("POST", "/v1/completions/", 404, "NotFoundError"),
        ("POST", "/" + "x" * 5000, 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("DELETE", "/v1/models", 405, "MethodNotAllowedError"),
        ("DELETE", "/v1/embeddings", 405, "MethodNotAllowedError"),
        ("POST", "/health", 405, "MethodNotAllowedError"),
    ],
)
async def test_unknown_paths_and_methods(method: str, path: str, status: int, kind: str) -> None:
    async with in_process(FakeClient()) as http:
        answer = await http.send(http.build_request(method, httpx.URL("http://localhost", path=path)))
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, None)
    assert path[:200] in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for method, paths in NOT_IMPLEMENTED.items() for path in paths],
)
async def test_an_endpoint_that_only_vllm_has_is_named(method: str, path: str) -> None:
    """Not 404: a client would read that as "no such model", and a proxy as a reason to leave the server."""
    address = path.replace("{response_id}", "resp_1")
    async with in_process(FakeClient()) as http:
        answer = await http.request(method, address, content=b"{}")
    if path.startswith("/v1/messages/"):
        assert answer.status_code == 400 and path in answer.json()["error"]["message"]
        return
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (400, "NotImplementedError")
    assert f"{method} {address} " in error["message"] and "not implement" in error["message"]


async def test_an_endpoint_that_only_vllm_has_needs_the_key_too() -> None:
    async with in_process(FakeClient(), api_keys=("k",)) as http:
        assert (await http.post("/pooling", json={})).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "switch"),
    [
        ("GET", "/tokenizer_info", "--enable-tokenizer-info-endpoint"),
        ("GET", "/is_sleeping", "VLLM_SERVER_DEV_MODE"),
        ("POST", "/reset_prefix_cache", "VLLM_SERVER_DEV_MODE"),
    ],
)
async def test_an_endpoint_that_is_switched_off_names_its_switch(method: str, path: str, switch: str) -> None:
    client = FakeClient()
    async with in_process(client) as http:
        answer = await http.request(method, path)
    assert answer.status_code == 400 and switch in error_of(answer)["message"] and not client.resets


async def test_a_bug_is_answered_without_its_traceback() -> None:
    client = FakeClient()
    app = create_app(client, ServerArgs())  # type: ignore[arg-type]
    client.processor = None  # type: ignore[assignment]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/v1/completions", json={"prompt": "hi"})
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "Internal server error."


KEYED = {"api_keys": ("sécret-1", "secret-2")}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer secret-3",
        b"Bearer secret-",
        b"Bearer secret-22",
        b"Basic secret-2",
        b"secret-2",
        b"Bearer s\xe9cret-1",  # Latin-1, where the key is UTF-8
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
    ],
)
async def test_wrong_keys(authorization: bytes | None) -> None:
    headers = [] if authorization is None else [(b"authorization", authorization)]
    async with in_process(FakeClient(), **KEYED) as http:
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("GET", "/x"),
        ):
            answer = await http.request(method, path + "?api_key=secret-2", headers=headers)
            assert (answer.status_code, answer.text) == (401, '{"error":"Unauthorized"}')
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ping", "/version"):
            assert (await http.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize("key", ["sécret-1", "secret-2"])
async def test_right_keys(key: str) -> None:
    async with in_process(FakeClient(), **KEYED) as http:
        headers = {"authorization": f"Bearer {key}".encode()}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        twice = [(b"authorization", b"Bearer wrong"), (b"authorization", headers["authorization"])]
        assert (await http.get("/v1/models", headers=twice)).status_code == 401


@pytest.mark.parametrize("host", ["a/?x=", "a/#", "server/health?", "server/health#"])
async def test_a_forged_host_opens_nothing(host: str) -> None:
    async with in_process(FakeClient(), **KEYED) as http:
        assert (await http.get("/v1/models", headers={"host": host})).status_code == 401


@pytest.mark.parametrize(
    "options",
    [
        {"port": 0},
        {"port": 70000},
        {"uvicorn_log_level": "loud"},
        {"api_keys": ("",)},
        {"served_model_names": ("",)},
        {"response_role": ""},
        {"shutdown_timeout": -1},
        {"shutdown_timeout": float("nan")},
        {"stats_interval": 0},
        {"max_body_bytes": 0},
        {"max_stop_strings": 0},
        {"max_stop_strings": 1025},
        {"enable_per_request_metrics": True, "disable_log_stats": True},
    ],
)
def test_wrong_server_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerArgs(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/chat/completions", "It is at /v1/chat/completions"),
        ("/v1/v1/messages", "adds /v1 to a base URL that has it"),
        ("/v1/files", "no endpoint /v1/files."),
    ],
)
async def test_a_wrong_base_url_is_explained(path: str, said: str) -> None:
    answer = await post(path, b"{}")
    assert answer.status_code == 404 and said in error_of(answer)["message"]
