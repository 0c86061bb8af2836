"""/generate and /generate_stream, and the Python example of the README: one prompt, one text."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
import torch
from fake_client import FakeClient, fresh
from http_tools import events, eventually, in_process, real_server
from model_tools import ROOT, make_engine, variant_folder

import microvllm
from microvllm.openai_compat.api.reading import read_request
from microvllm.openai_compat.api.requests import PromptRequest, PromptStreamRequest
from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput
from microvllm.runtime.text.detokenizer import OutputProcessor, TextDelta

PATHS = ("/generate", "/generate_stream")
CHINESE = "写一个 Java 版本的文件上传代码"
DOCUMENTED = {"prompt": CHINESE, "max_tokens": 500, "temperature": 0.7}
ANSWER = "好的 这是代码 🙂 class Upload {}"


class Reciter(FakeClient):
    """Answers `ANSWER` to everything, one byte a token, through the engine's own detokenizer."""

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        text = OutputProcessor(self.tokenizer, request)  # type: ignore[arg-type]
        ids = self.tokenizer.encode(ANSWER, add_special_tokens=False)[: request.params.max_tokens]
        deltas = []
        for index, token in enumerate(ids):
            end = FinishReason.LENGTH if index == len(ids) - 1 else None
            deltas.append(text.process(StepOutput(request.request_id, [token], end)))
            if deltas[-1].finish_reason is not None:
                break
        return deltas


def reciter() -> Reciter:
    return Reciter(max_model_len=1024)


async def post(
    path: str, body: dict[str, Any], client: FakeClient | None = None, **args: Any
) -> httpx.Response:
    async with in_process(client or FakeClient(), **args) as server:
        return await server.post(path, json=body)


def joined(chunks: list[Any]) -> str:
    return "".join(chunk["text"] for chunk in chunks)


# ---- what the documents show ----------------------------------------------------------------------


async def test_a_whole_answer() -> None:
    client = reciter()
    answer = await post("/generate", DOCUMENTED, client)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    tokens = len(ANSWER.encode())
    body = answer.json()
    assert body == {
        "id": body["id"],
        "text": ANSWER,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "usage": {
            "prompt_tokens": 1 + len(CHINESE.encode()),
            "total_tokens": 1 + len(CHINESE.encode()) + tokens,
            "completion_tokens": tokens,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "metrics": None,
    }
    assert body["id"].startswith("gen-")
    assert ANSWER in answer.content.decode() and "\\u" not in answer.text
    ((ids, params, _, _),) = client.submitted
    assert bytes(ids[1:]).decode() == CHINESE
    assert (params.max_tokens, params.temperature, params.n) == (500, 0.7, 1)


@pytest.mark.parametrize(
    ("path", "stream"),
    [("/generate_stream", {"stream": True}), ("/generate_stream", {}), ("/generate", {"stream": True})],
)
async def test_a_stream(path: str, stream: dict[str, bool]) -> None:
    answer = await post(path, {**DOCUMENTED, **stream}, reciter())
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert "\\u" not in answer.text and "🙂" in answer.content.decode()
    chunks = events(answer.text)
    assert joined(chunks) == ANSWER and "\ufffd" not in answer.text
    assert {tuple(chunk) for chunk in chunks} == {
        ("id", "text", "finish_reason", "stop_reason", "token_ids")
    } and len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) == len(ANSWER.encode())


async def test_the_paths_differ_in_the_default_alone() -> None:
    body = {"prompt": "hi", "max_tokens": 9, "temperature": 0}
    whole = [(await post(path, {**body, "stream": False})).json() for path in PATHS]
    assert whole[0].pop("id") != whole[1].pop("id") and whole[0] == whole[1]
    assert PromptStreamRequest.__struct_fields__ == PromptRequest.__struct_fields__
    plain, stream = (read_request(kind, {"prompt": "hi"}) for kind in (PromptRequest, PromptStreamRequest))
    assert {**msgspec.structs.asdict(plain), "stream": True} == msgspec.structs.asdict(stream)


async def test_it_is_the_text_of_a_completion() -> None:
    """Every sampling field reaches the engine as it does from /v1/completions."""
    options: dict[str, Any] = {
        "prompt": "hi", "max_tokens": 30, "temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.01,
        "seed": 5, "stop": ["q", "zz"], "stop_token_ids": [33], "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "repetition_penalty": 1.1, "logit_bias": {"97": 2}, "bad_words": ["no"],
        "ignore_eos": True, "min_tokens": 3, "include_stop_str_in_output": True, "priority": 4,
        "cache_salt": "s", "add_special_tokens": False, "truncate_prompt_tokens": 1,
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3}, "return_token_ids": True,
    }  # fmt: skip
    clients = [FakeClient(), FakeClient()]
    completion, native = [
        (await post(path, options, client)).json()
        for path, client in zip(("/v1/completions", "/generate"), clients, strict=True)
    ]
    assert clients[0].submitted == clients[1].submitted != []
    (choice,) = completion["choices"]
    for name in ("text", "finish_reason", "stop_reason", "token_ids"):
        assert native[name] == choice[name]
    assert native["usage"] == completion["usage"]


# ---- fields ---------------------------------------------------------------------------------------


async def test_defaults() -> None:
    client = FakeClient()
    await post("/generate", {"prompt": "hi"}, client)
    ((ids, params, priority, salt),) = client.submitted
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (16, 1.0, 0, 1.0)
    assert (priority, salt, len(ids)) == (0, "", 3)
    client = FakeClient(defaults={"temperature": 0.3, "top_k": 20})
    await post("/generate", {"prompt": "hi", "top_k": 5}, client)
    assert (client.submitted[0][1].temperature, client.submitted[0][1].top_k) == (0.3, 5)


async def test_stop_and_token_ids() -> None:
    body = {"prompt": "hi", "max_tokens": 100, "stop": ["代码"], "return_token_ids": True}
    whole = (await post("/generate", body, reciter())).json()
    assert (whole["text"], whole["finish_reason"], whole["stop_reason"]) == ("好的 这是", "stop", "代码")
    assert bytes(whole["token_ids"]).decode() == "好的 这是代码"
    chunks = events((await post("/generate_stream", body, reciter())).text)
    assert joined(chunks) == whole["text"] and chunks[-1]["stop_reason"] == "代码"
    assert list(itertools.chain(*(chunk["token_ids"] for chunk in chunks))) == whole["token_ids"]


async def test_usage_and_times_in_a_stream() -> None:
    body = {"prompt": "hi", "max_tokens": 5, "ignore_eos": True, "stream_options": {"include_usage": True}}
    chunks = events((await post("/generate_stream", body, enable_per_request_metrics=True)).text)
    counts = {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
    assert len(chunks) == 6 and chunks[-1]["text"] == "" and chunks[-1]["usage"] == counts
    assert chunks[-1]["metrics"]["queue_time_ms"] == 0
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await post("/generate_stream", body)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
    whole = (
        await post("/generate", {"prompt": "hi", "max_tokens": 5}, enable_per_request_metrics=True)
    ).json()
    assert whole["metrics"]["time_to_first_token_ms"] >= 0


async def test_a_stream_interval_joins_tokens() -> None:
    chunks = events((await post("/generate_stream", {**DOCUMENTED, "stream_interval": 10}, reciter())).text)
    assert joined(chunks) == ANSWER and len(chunks) < len(ANSWER.encode()) / 5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", ""), ("prompt", ["a", "b"]), ("prompt", [1, 2]), ("prompt", 5),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "many"), ("max_tokens", 257),
        ("max_tokens", 1.5), ("temperature", -1), ("temperature", 3), ("temperature", "hot"),
        ("top_k", -2), ("top_p", 0), ("stop", [""]), ("stop", ["a"] * 5), ("stream", "perhaps"),
        ("n", 2), ("echo", True), ("logprobs", 1), ("logprobs", True), ("use_beam_search", True),
        ("length_penalty", 2), ("prompt_logprobs", 0), ("suffix", "x"), ("seed", 1 << 64),
        ("truncate_prompt_tokens", 0),
    ],
    ids=str,
)  # fmt: skip
async def test_a_wrong_field_is_named(path: str, field: str, value: Any) -> None:
    client = FakeClient()
    answer = await post(path, {"prompt": "hi", "max_tokens": 4, field: value}, client)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400
    assert error["param"] in (field, f"body.{field}") and not client.submitted


async def test_requests_that_cannot_be() -> None:
    assert (await post("/generate", {"max_tokens": 4})).json()["error"]["param"] == "body.prompt"
    long = await post("/generate", {"prompt": "x" * 300})
    assert long.status_code == 400 and "maximum context length is 256" in long.json()["error"]["message"]
    model = await post("/generate", {"prompt": "hi", "model": "gpt-9"})
    assert model.status_code == 404 and model.json()["error"]["param"] == "model"
    options = await post("/generate", {"prompt": "hi", "stream_options": {"include_usage": True}})
    assert options.status_code == 400 and options.json()["error"]["param"] == "stream_options"
    big = await post("/generate", {"prompt": "x" * 300}, max_body_bytes=100)
    assert big.status_code == 413
    busy = await post("/generate_stream", {"prompt": "hi"}, fresh(busy=True))
    assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
    async with in_process(FakeClient()) as server:
        for path in PATHS:
            assert (await server.get(path)).status_code == 405


# ---- what all endpoints share ---------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_a_key_is_needed(path: str) -> None:
    client = FakeClient()
    async with in_process(client, api_keys=("right",)) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = await server.post(path, json={"prompt": "hi"}, headers=headers)
            assert answer.status_code == 401 and not client.submitted
        answer = await server.post(path, json={"prompt": "hi"}, headers={"authorization": "Bearer right"})
        assert answer.status_code == 200 and len(client.submitted) == 1


async def test_ids_priorities_and_counts() -> None:
    client = FakeClient()
    async with in_process(client) as server:
        headers = {"x-request-id": "mine", "x-vllm-priority": "-3"}
        answer = await server.post("/generate", json={"prompt": "hi", "priority": 5}, headers=headers)
        assert answer.json()["id"] == "gen-mine" and client.submitted[0][2] == -3
        await server.post("/generate_stream", json={"prompt": "hi", "temperature": 9})
        metrics = (await server.get("/metrics")).text
    requests = dict(
        re.findall(r'^http_requests_total\{handler="(/gen\w+)".*status="(\dxx)"\} 1\.0$', metrics, re.M)
    )
    assert requests == {"/generate": "2xx", "/generate_stream": "4xx"}


async def test_a_failure_in_the_middle() -> None:
    body = {"prompt": "hi", "max_tokens": 8, "ignore_eos": True}
    whole = await post("/generate", body, fresh(fail_after=2))
    assert whole.status_code == 500 and whole.json()["error"]["message"] == "The engine failed."
    streamed = await post("/generate_stream", body, fresh(fail_after=2))
    *chunks, error = events(streamed.text)
    assert len(chunks) == 2 and error["error"]["message"] == "The engine failed."


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_ends_its_request(path: str) -> None:
    client = fresh(stall_after=2)
    with real_server(client) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({"prompt": "hi", "max_tokens": 200, "ignore_eos": True})
        connection.request("POST", path, body, {"content-type": "application/json"})
        eventually(lambda: len(client.running) == 1 and client.tokens_made == 2)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        eventually(lambda: not client.running)
        assert client.aborted == 1


# ---- with a real engine ---------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[httpx.AsyncClient]:
    config = EngineArgs(
        model=str(variant_folder("llama-tied")), dtype="float32", cpu_threads=1, num_gpu_blocks_override=64
    ).resolve()
    engine = await EngineClient.start(config)
    transport = httpx.ASGITransport(create_app(engine, ServerArgs()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client:
        yield client
    await engine.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_real_engine_answers(server: httpx.AsyncClient) -> None:
    body = {"prompt": CHINESE, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    offline = make_engine(variant_folder("llama-tied"))
    text = offline.generate(CHINESE, 24, temperature=0.0, ignore_eos=True)[CHINESE]
    whole = (await server.post("/generate", json=body)).json()
    assert whole["text"] == text and whole["usage"]["completion_tokens"] == 24
    chunks = events((await server.post("/generate_stream", json=body)).text)
    assert joined(chunks) == text and chunks[-1]["finish_reason"] == "length"
    metrics = (await server.get("/metrics")).text
    assert re.search(r'^vllm:request_success_total\{.*finished_reason="length".*\} 2\.0$', metrics, re.M)
    assert re.search(r"^vllm:generation_tokens_total\{.*\} 48\.0$", metrics, re.M)


# ---- the Python interface -------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[Callable[[str], InferenceEngine]]:
    """An engine whose model says what it is told to, a token a step; everything behind the logits is real."""
    engine = make_engine(variant_folder("llama-tied"), async_scheduling=False)
    model: Any = engine.core._runner.model  # type: ignore[attr-defined]
    logits = model.logits

    def speak(text: str) -> InferenceEngine:
        script = iter(engine.tokenizer.encode(text))

        def said(hidden: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = logits(hidden)
            result.fill_(-1e4)[:, next(script)] = 1e4
            return result

        model.logits = said
        return engine

    yield speak
    model.logits = logits
    assert not engine.core.has_work() and engine.core.kv.num_used == 0


def test_a_stream_of_chinese_text(scripted: Callable[[str], InferenceEngine]) -> None:
    engine = scripted(ANSWER)
    ids = engine.tokenizer.encode(ANSWER)
    pairs = list(
        engine.stream_generate(CHINESE, max_tokens=len(ids), temperature=0.7, top_k=20, top_p=0.9, seed=1)
    )
    assert [token for token, _ in pairs] == ids
    assert "".join(text for _, text in pairs) == ANSWER
    texts = [text for _, text in pairs if text]
    assert len(texts) < len(pairs), "some tokens end inside of a character"
    assert not any("\ufffd" in text for text in texts) and "🙂" in texts


def test_texts_end_at_a_stop_string(scripted: Callable[[str], InferenceEngine]) -> None:
    options: dict[str, Any] = {"max_tokens": 50, "stop": "代码", "temperature": 0.0}
    assert scripted(ANSWER).generate([CHINESE], **options) == {CHINESE: "好的 这是"}
    text = "".join(text for _, text in scripted(ANSWER).stream_generate(CHINESE, **options))
    assert text == "好的 这是"


def test_several_tokens_a_step_have_their_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(variant_folder("llama-tied"))
    deltas = [TextDelta([1, 2, 3], "abc"), TextDelta([4], "d", "length")]
    monkeypatch.setattr(engine, "generate_deltas", lambda requests: ((0, delta) for delta in deltas))
    assert list(engine.stream_generate("x")) == [(1, ""), (2, ""), (3, "abc"), (4, "d")]


def test_the_example_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs as it stands, on a smaller model, and does what the words around it say."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[0]
    seen: list[dict[str, Any]] = []

    def small(**options: Any) -> InferenceEngine:
        seen.append(options)
        return make_engine(variant_folder("qwen3"), max_num_seqs=options["max_batch_size"])

    monkeypatch.setattr(microvllm, "InferenceEngine", small, raising=False)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert seen == [{"model_path": "smollm2-135m-instruct", "max_batch_size": 32}]
    assert list(names["results"]) == ["Hello", "AI is"]
    printed = capsys.readouterr().out
    assert all(f"{prompt}: {text}\n" in printed for prompt, text in names["results"].items())
    assert isinstance(names["token"], int) and printed.endswith(names["text"])
