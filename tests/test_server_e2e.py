"""A real `microvllm serve` process and the openai SDK: answers, clients that leave, stops and deaths."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_tools import health_of, held_port
from model_tools import LONG, long_folder, make_engine, variant_folder
from process_tools import PATIENCE_S, alive, engines_of, wait_until

from microvllm.runtime.options.find_model import DEMO_MODEL
from microvllm.runtime.text.tokenizer import Tokenizer

PROMPT = "The quick brown fox"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WHOLE: dict[str, Any] = {"extra_body": {"ignore_eos": True}}  # no end token cuts the answer short
SOON_S = 20.0  # less than `LONG` tokens take, and patient with a busy machine


class Server:
    """A server process that answers, and its clients. `model` is the name in requests."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, model: str) -> None:
        self.process, self.port, self.log, self.model = process, port, log, model
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=PATIENCE_S, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", timeout=PATIENCE_S, max_retries=0)

    def health(self) -> int:
        return health_of(self.port)

    def engine_pid(self) -> int:
        (pid,) = engines_of(self.process.pid)
        return pid

    def complete(self, max_tokens: int, prompt: Any = PROMPT, **options: Any) -> Any:
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, **{"temperature": 0, **WHOLE, **options}
        )


@contextlib.contextmanager
def serve(folder: Path, model: Path | str, *flags: str) -> Iterator[Server]:
    """Starts a server and waits until it answers; afterwards neither it nor its engine is there."""
    held = held_port()
    port = held.getsockname()[1]
    log = folder / "server.log"
    command = [sys.executable, "-m", "microvllm.cli", "serve", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--cpu-threads", "1", *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    server = Server(process, port, log, str(model))
    try:
        wait_until(lambda: process.poll() is not None or server.health() == 200, "the server answers")
        assert process.poll() is None, log.read_text()
        yield server
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        engines = engines_of(process.pid)
        server.client.close()
        held.close()
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(alive, engines)), "the engine has ended")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--max-num-seqs", "8", "--shutdown-timeout", "60")
    with serve(tmp_path_factory.mktemp("server"), variant_folder("llama-tied"), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(variant_folder("llama-tied"))


@pytest.fixture(scope="module")
def expected() -> str:
    """The first 40 greedy tokens after PROMPT, from the engine in this process."""
    engine = make_engine(variant_folder("llama-tied"))
    return engine.generate(PROMPT, 40, temperature=0.0, ignore_eos=True)[PROMPT]


# ---- answers --------------------------------------------------------------------------------------


def test_the_model_is_listed(server: Server) -> None:
    (model,) = server.client.models.list().data
    assert model.id == server.model


def test_a_completion(server: Server, tokenizer: Tokenizer, expected: str) -> None:
    answer = server.complete(40)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected, "length", 0)
    prompt_tokens = len(tokenizer.encode(PROMPT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 40)
    assert usage.total_tokens == prompt_tokens + 40


def test_a_streamed_completion(server: Server, tokenizer: Tokenizer, expected: str) -> None:
    chunks = list(server.complete(40, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert chunks[-1].usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == expected
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(server: Server, tokenizer: Tokenizer) -> None:
    wish: dict[str, Any] = {
        "model": server.model,
        "messages": MESSAGES,
        "max_tokens": 20,
        "temperature": 0,
        **WHOLE,
    }
    whole = server.client.chat.completions.create(**wish)
    engine = make_engine(variant_folder("llama-tied"))
    prompt = engine.processor.tokenize_prompt(engine.processor.render_text(MESSAGES), False)
    assert whole.usage.prompt_tokens == len(prompt) and whole.usage.completion_tokens == 20
    message = whole.choices[0].message
    assert message.role == "assistant" and whole.choices[0].finish_reason == "length"
    same = server.complete(20, prompt)
    assert same.choices[0].text == message.content
    chunks = list(server.client.chat.completions.create(stream=True, **wish))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_samples(server: Server, expected: str) -> None:
    answer = server.complete(10, [PROMPT, "x", PROMPT])
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts[0] == texts[2] != texts[1] and expected.startswith(texts[0].rstrip("\ufffd"))
    assert answer.usage.completion_tokens == 30
    wish: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.0}
    first, second = [
        server.client.completions.create(model=server.model, prompt="x", **wish) for _ in range(2)
    ]
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == 3


async def test_many_at_once_with_the_async_client(server: Server, expected: str) -> None:
    """More than there are rows, streamed and not; every one gets what it would get alone."""
    prompts = [f"{PROMPT} {i}" for i in range(10)]
    alone = {prompt: server.complete(24, prompt).choices[0].text for prompt in prompts[:3]}
    async with server.async_client() as client:

        async def whole(prompt: str) -> str:
            answer = await client.completions.create(
                model=server.model, prompt=prompt, max_tokens=24, temperature=0, **WHOLE
            )
            return answer.choices[0].text

        async def streamed(prompt: str) -> str:
            stream = await client.completions.create(
                model=server.model, prompt=prompt, max_tokens=24, temperature=0, stream=True, **WHOLE
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        results = await asyncio.gather(*map(whole, prompts), *map(streamed, prompts))
    assert results[:10] == results[10:]
    for prompt, text in alone.items():
        assert results[prompts.index(prompt)] == text


def test_answers_have_their_form(server: Server) -> None:
    """Of an engine process that compiles the grammar again, whole and streamed, beside a free request."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}},
    }
    options: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 60}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        free = pool.submit(server.complete, 40)
        answer = server.client.chat.completions.create(response_format=form, n=2, temperature=1, **options)
        stream = server.client.chat.completions.create(response_format=form, stream=True, **options)
        texts = ["".join(chunk.choices[0].delta.content or "" for chunk in stream)]
        assert free.result().usage.completion_tokens == 40
    texts += [str(choice.message.content) for choice in answer.choices]
    assert all(json.loads(text) in ({"a": 1}, {"a": "x"}) for text in texts), texts
    with pytest.raises(openai.BadRequestError, match="uniqueItems is not supported") as caught:
        server.complete(4, extra_body={"structured_outputs": {"json": {"uniqueItems": True}}})
    assert caught.value.param == "structured_outputs"


def test_wrong_requests_are_the_sdk_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(5, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        server.complete(5, "word " * 600)
    assert server.complete(3).usage.completion_tokens == 3


# ---- clients that leave ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One row, and a pool that one request of full length fills: the next can only run when it is gone."""
    folder = tmp_path_factory.mktemp("narrow")
    pool = ("--num-gpu-blocks-override", str(LONG // 16), "--max-num-seqs", "1")
    with serve(folder, long_folder(), "--dtype", "float32", "--shutdown-timeout", "0.5", *pool) as server:
        server.complete(2)
        yield server


def assert_free(server: Server) -> None:
    """A request is served at once, which it is not while the long one runs."""
    start = time.monotonic()
    assert server.complete(3).usage.completion_tokens == 3
    assert time.monotonic() - start < SOON_S


def test_a_request_waits_while_the_long_one_runs(narrow: Server) -> None:
    """The ground of the tests below: as long as the long request has its client, nobody else is served."""
    stream = narrow.complete(LONG - 100, stream=True)
    assert next(iter(stream)).choices
    with pytest.raises(openai.APITimeoutError):
        narrow.client.with_options(timeout=2.0).completions.create(
            model=narrow.model, prompt="x", max_tokens=1
        )
    stream.close()
    assert_free(narrow)


@pytest.mark.parametrize("chunks", [0, 1, 20])
def test_leaving_a_stream_ends_it(narrow: Server, chunks: int) -> None:
    stream = narrow.complete(LONG - 100, stream=True)
    for _, chunk in zip(range(chunks), stream, strict=False):
        assert chunk.choices[0].finish_reason is None, "chunks come as tokens are made, not all at the end"
    stream.close()
    assert_free(narrow)


def test_leaving_while_waiting_for_a_whole_answer_ends_it(narrow: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        narrow.client.with_options(timeout=1.0).completions.create(
            model=narrow.model, prompt=PROMPT, max_tokens=LONG - 100, **WHOLE
        )
    assert_free(narrow)


async def test_a_cancelled_async_request_ends(narrow: Server) -> None:
    async with narrow.async_client() as client:
        request = asyncio.ensure_future(
            client.completions.create(model=narrow.model, prompt=PROMPT, max_tokens=LONG - 100, **WHOLE)
        )
        await asyncio.sleep(0.5)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        start = time.monotonic()
        answer = await client.completions.create(model=narrow.model, prompt="x", max_tokens=3, **WHOLE)
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        assert time.monotonic() - start < SOON_S


def test_leaving_from_the_queue(narrow: Server) -> None:
    """Requests that never ran are given up too; the running one and a patient one get through."""
    stream = narrow.complete(LONG - 100, stream=True)
    next(iter(stream))
    for _ in range(3):
        with pytest.raises(openai.APITimeoutError):
            narrow.client.with_options(timeout=0.3).completions.create(
                model=narrow.model, prompt=PROMPT, max_tokens=LONG - 100, **WHOLE
            )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        patient = pool.submit(narrow.complete, 3)
        time.sleep(0.3)
        assert not patient.done()
        stream.close()
        assert patient.result(SOON_S).usage.completion_tokens == 3


# ---- the engine dies ------------------------------------------------------------------------------


def test_a_killed_engine_is_an_error_event_a_503_and_then_well_again(narrow: Server, expected: str) -> None:
    stream = narrow.complete(LONG - 100, stream=True)
    next(iter(stream))
    pid = narrow.engine_pid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine process died"):
        for _ in stream:
            pass
    assert narrow.health() == 503
    with pytest.raises(openai.InternalServerError) as caught:
        narrow.complete(3)
    assert caught.value.status_code == 503
    wait_until(lambda: narrow.health() == 200, "the engine is back")
    assert narrow.engine_pid() != pid
    assert narrow.complete(40).choices[0].text == expected


# ---- the server stops: each test ends one of the servers that the tests above have used --------------


def test_sigterm_finishes_what_runs_and_exits_with_0(server: Server, expected: str) -> None:
    engine = server.engine_pid()
    stream = server.complete(400, stream=True)
    first = next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    chunks = [first, *stream]
    assert sum(chunk.choices[0].finish_reason == "length" for chunk in chunks) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks).startswith(expected.rstrip("\ufffd"))
    assert server.process.wait(PATIENCE_S) == 0
    wait_until(lambda: not alive(engine), "the engine has ended")
    assert "Traceback" not in server.log.read_text()


def test_sigterm_cuts_what_takes_too_long(narrow: Server) -> None:
    stream = narrow.complete(LONG - 100, stream=True)
    next(iter(stream))
    narrow.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in stream:
            pass
    assert narrow.process.wait(PATIENCE_S) == 0


# ---- the real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("smollm2"), DEMO_MODEL) as server:
        yield server


@pytest.mark.model
def test_the_capital_of_france(smollm2: Server) -> None:
    wish: dict[str, Any] = {"model": DEMO_MODEL, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    answer = smollm2.client.chat.completions.create(**wish)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(smollm2.client.chat.completions.create(stream=True, **wish))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    )
    text = smollm2.complete(8, "The capital of France is").choices[0].text
    assert "Paris" in text


@pytest.mark.model
def test_the_capital_of_france_as_a_response(smollm2: Server) -> None:
    responses = smollm2.client.responses
    wish: dict[str, Any] = {"model": smollm2.model, "temperature": 0, "max_output_tokens": 30}
    whole = responses.create(**wish, input="What is the capital of France?")
    assert "Paris" in whole.output_text and whole.status == "completed"
    assert responses.retrieve(whole.id) == whole
    with responses.stream(**wish, input="Again, please.", previous_response_id=whole.id) as stream:
        events = list(stream)
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1].response
    assert len(texts) > 2 and "".join(texts) == last.output_text
    assert last.usage.input_tokens > whole.usage.total_tokens  # the conversation up to here is in the prompt


@pytest.mark.model
async def test_the_capital_of_france_asynchronously(smollm2: Server) -> None:
    async with smollm2.async_client() as client:

        async def ask() -> str:
            stream = await client.chat.completions.create(
                model=DEMO_MODEL, messages=MESSAGES, max_tokens=40, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(ask() for _ in range(4)))
    assert all("Paris" in answer for answer in answers)


@pytest.mark.model
def test_a_killed_server_takes_its_engine_along(smollm2: Server) -> None:
    engine = smollm2.engine_pid()
    smollm2.process.kill()
    wait_until(lambda: not alive(engine), "the engine has ended", SOON_S)
