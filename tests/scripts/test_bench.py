"""The benchmark's client: how it reads a stream, its figures, and itself against a scripted server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_client import FakeClient
from http_tools import real_server
from hypothesis import given
from hypothesis import strategies as st
from process_tools import PATIENCE_S

from microvllm.openai_compat.bench import client, figures
from microvllm.openai_compat.bench.client import (
    BenchError,
    Completion,
    Conversation,
    Exchange,
    Measured,
    Prompt,
    RequestResult,
    Target,
    measure,
    read_stream,
)
from microvllm.openai_compat.bench.workloads import Case, random_texts

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"

# ---------------------------------------------------------------- reading a stream


def chunk(text: str = "a", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def usage(tokens: int, prompt: int = 7) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def answer(*pieces: tuple[float, bytes], status: int = 200) -> Exchange:
    return Exchange(started=100.0, status=status, pieces=[(100.0 + at, data) for at, data in pieces])


def test_times_of_a_stream() -> None:
    pieces = [(0.5, chunk()), (0.75, chunk()), (1.5, chunk(finish="length")), (1.5, usage(3) + DONE)]
    result = read_stream(answer(*pieces), 3)
    assert (result.error, result.prompt_tokens, result.completion_tokens) == ("", 7, 3)
    assert (result.ttft, result.latency, result.itls) == (0.5, 1.5, [0.25, 0.75])
    assert result.tpot == 0.5
    assert result.counted_by == "usage"


def test_chunks_of_several_tokens_are_counted_by_usage_and_seen_between_chunks() -> None:
    result = read_stream(answer((1, chunk("ab")), (2, chunk("cdef", "length")), (2, usage(6))), 6)
    assert (result.error, result.completion_tokens, result.itls, result.tpot) == ("", 6, [1.0], 0.2)


def test_first_token_is_the_first_with_text_and_the_finish_ends_the_request() -> None:
    pieces = [(1, chunk("")), (2, chunk("a")), (3, chunk("b")), (4, chunk("", "length")), (5, usage(4))]
    result = read_stream(answer(*pieces), 4)
    assert (result.ttft, result.latency, result.itls) == (2.0, 4.0, [1.0])


def test_usage_in_the_last_chunk_of_the_choice_counts_too() -> None:
    last = chunk("", "stop", usage={"prompt_tokens": 5, "completion_tokens": 2})
    assert read_stream(answer((1, chunk()), (2, chunk()), (3, last)), 2).completion_tokens == 2


@pytest.mark.parametrize(
    ("last", "tokens", "counted_by"),
    [
        (chunk("c", "length"), 5, "finish_reason"),
        (chunk("c", "stop"), 3, "chunks"),
        (chunk("c"), 3, "chunks"),
    ],
)
def test_without_usage_the_finish_reason_or_the_chunks_count(
    last: bytes, tokens: int, counted_by: str
) -> None:
    result = read_stream(answer((1, chunk()), (2, chunk()), (3, last), (3, DONE)), 5)
    assert (result.completion_tokens, result.counted_by) == (tokens, counted_by)
    assert bool(result.error) == (tokens != 5)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (answer((1, chunk()), (2, usage(1))), "1 tokens in place of 2"),
        (answer((1, b'{"error": "no"}'), status=503), 'HTTP status 503: {"error": "no"}'),
        (answer((1, chunk()), (2, b'data: {"error": {"message": "out of memory"}}\n\n')), "out of memory"),
        (answer((1, b"data: {oops\n\n")), "not JSON: {oops"),
        (answer((1, b"data: 3\n\n")), "the stream says 3"),
        (answer((1, DONE)), "the stream has no tokens"),
        (answer((1, usage(2))), "the stream has no tokens"),
        (Exchange(100.0, failure="the connection broke off"), "the connection broke off"),
    ],
)
def test_what_is_no_answer_of_the_wanted_length_is_an_error(exchange: Exchange, message: str) -> None:
    assert message in read_stream(exchange, 2).error


@given(cuts=st.lists(st.integers(0, 10_000), max_size=30), ending=st.sampled_from([b"\n", b"\r\n"]))
def test_any_cut_of_the_bytes_gives_the_same_events(cuts: list[int], ending: bytes) -> None:
    """Each event has the moment of the piece that completes its line."""
    events = [
        chunk("é", marker=0),
        b": a comment\n\n",
        chunk("b", marker=1),
        chunk("c", "length", marker=2),
        DONE,
    ]
    whole = b"".join(events).replace(b"\n", ending)
    edges = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    pieces = [(float(end), whole[start:end]) for start, end in pairwise(edges)]
    result = list(client.read_events(pieces))
    assert [event["marker"] for _, event in result] == [0, 1, 2]
    for moment, event in result:
        line_end = whole.index(b'"marker": %d' % event["marker"])
        line_end = whole.index(b"\n", line_end) + 1
        assert moment == min(edge for edge in edges if edge >= line_end)


# ---------------------------------------------------------------- the figures


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def request_result(ttft: float, latency: float, tokens: int, error: str = "") -> RequestResult:
    return RequestResult(error, ttft, latency, [1.0] * (tokens - 1), 10, tokens)


def case(**more: Any) -> Case:
    return Case("w", "l", ((1, 5),), **more)


def as_vllm(requests: list[RequestResult], duration: float, **more: Any) -> dict[str, Any]:
    return figures.as_vllm(Measured(requests, duration, 0.5), case(**more), model="m", detailed=True)


def test_report_has_the_figures_of_vllms_client() -> None:
    good = [request_result(1.0, 2.0, 5), request_result(2.0, 4.0, 3)]
    result = as_vllm([*good, request_result(9.0, 99.0, 7, "7 tokens in place of 5")], 4.0, concurrency=2)
    assert (result["completed"], result["failed"], result["max_concurrency"]) == (2, 1, 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 8)
    assert (result["output_throughput"], result["request_throughput"]) == (2.0, 0.5)
    assert result["total_token_throughput"] == 7.0
    assert (result["mean_ttft_ms"], result["p50_tpot_ms"], result["p99_itl_ms"]) == (1500.0, 625.0, 1000.0)
    assert (result["median_e2el_ms"], result["std_e2el_ms"]) == (3000.0, 1000.0)
    assert result["ttfts"] == [1.0, 2.0, 9.0] and result["errors"] == ["", "", "7 tokens in place of 5"]
    assert result["error_messages"] == ["7 tokens in place of 5"]
    assert (result["request_rate"], result["backend"]) == ("inf", "openai")
    assert as_vllm(good, 4.0, request_rate=2.5, turns=2)["request_rate"] == 2.5


VLLM_KEYS = """
    backend burstiness completed date duration endpoint_type errors failed generated_texts input_lens
    itls label latencies max_concurrency max_concurrent_requests max_output_tokens_per_s model_id
    num_prompts output_lens output_throughput queue_times request_goodput request_rate
    request_throughput rtfx start_times tokenizer_id total_input_tokens total_output_tokens
    total_token_throughput ttfts
""".split()


def test_the_names_are_those_that_vllms_client_saves() -> None:
    """`vllm bench serve --save-result --save-detailed` of vLLM 0.32, with --max-concurrency."""
    result = as_vllm([request_result(1.0, 2.0, 5)], 4.0, concurrency=2)
    metrics = [
        f"{figure}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el", "client_queue_time")
        for figure in ("mean", "median", "std", "p50", "p90", "p99")
    ]
    assert not {*VLLM_KEYS, *metrics} - set(result)
    brief = figures.as_vllm(Measured([], 1.0, 0.0), case(), model=None)
    assert set(result) - set(brief) == {
        *("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"),
        *(name for name in metrics if "queue" in name),  # there only where the concurrency is limited
    }
    assert (brief["completed"], brief["mean_ttft_ms"], brief["max_output_tokens_per_s"]) == (0, 0.0, 0.0)


def test_the_busiest_second() -> None:
    one = RequestResult("", 0.5, 2.5, [1.0, 1.0], 7, 6, started=0.0)  # two tokens at 0.5, 1.5 and 2.5 s
    other = RequestResult("", 0.25, 0.5, [0.25], 7, 2, started=1.25)  # a token at 1.5 and 1.75 s
    assert figures.peaks([one, other]) == (4.0, 2)
    assert figures.peaks([one, RequestResult("failed")]) == (2.0, 1)


def test_one_token_has_no_time_per_further_token() -> None:
    assert request_result(1.0, 1.0, 1).tpot is None
    assert figures.samples([request_result(1.0, 1.0, 1)])["tpot"] == []


# ---------------------------------------------------------------- talking to a server

Script = Sequence[tuple[float, bytes | None]]
"""(seconds to wait, bytes to send) one after the other; None closes the connection."""


@dataclass
class Scripted:
    """A server that answers every request with the same script and notes what it was sent."""

    script: Script
    url: str = ""
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.requests.append((first, headers, body))
            for seconds, data in self.script:
                await asyncio.sleep(seconds)
                if data is None:
                    break
                writer.write(data)
                await writer.drain()
        finally:
            self.open -= 1
            writer.close()


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    """The server in a thread, on a free port."""
    server, started, stopped = Scripted(script), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        await stopped.wait()
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def piece(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


TOKENS: Script = [
    (0.0, HEAD),
    (0.1, piece(chunk())),
    (0.05, piece(chunk())),
    (0.15, piece(chunk(finish="length"))),
    (0.0, piece(usage(3) + DONE) + END),
]


def completions(*prompts: Prompt, output_len: int = 3) -> list[Completion]:
    return [Completion(prompt, output_len) for prompt in prompts]


def test_measured_times_are_those_of_the_script() -> None:
    with scripted(TOKENS) as server:
        report = measure(Target(server.url), completions("x"), concurrency=1)
    (request,) = report.requests
    assert request.error == ""
    # Nothing comes before its time; how late it comes depends on what else the machine does, and what comes
    # late is nearer to what follows.
    first, second = request.itls
    assert 0.1 <= request.ttft < 20
    assert request.ttft + first >= 0.15 and request.ttft + first + second >= 0.3
    assert request.latency == pytest.approx(request.ttft + first + second)
    assert request.latency <= report.duration < 50
    assert report.output_throughput == pytest.approx(3 / report.duration)
    assert 0 < report.client_cpu_s <= report.duration


def test_a_request_is_what_vllms_client_sends() -> None:
    with scripted(TOKENS) as server:
        target = Target(server.url + "/base", "m", "secret", extra_body={"top_k": 1, "stream_options": None})
        measure(target, completions([5, 6]))
    ((first, headers, body),) = server.requests
    assert first == "POST /base/v1/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer secret"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == server.url.removeprefix("http://")
    options = {"max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True, "top_k": 1}
    assert json.loads(body) == {"model": "m", "prompt": [5, 6], **options}


@pytest.mark.parametrize("streams", [1, 3])
def test_as_many_requests_at_a_time_as_streams_and_each_prompt_once(streams: int) -> None:
    with scripted(TOKENS) as server:
        report = measure(Target(server.url), completions(*([n] for n in range(7))), concurrency=streams)
    assert not report.errors
    assert server.most_open == streams
    assert sorted(json.loads(body)["prompt"][0] for _, _, body in server.requests) == list(range(7))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([*TOKENS[:3], (0.0, None)], "the connection broke off"),
        ([(0.0, None)], "the connection broke off"),
        ([(0.0, b"SSH-2.0-OpenSSH_9.2\r\n"), (0.2, None)], "not HTTP"),
        ([*TOKENS[:3], (30.0, None)], "no whole answer within 0.5 s"),
        ([(0.0, b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone")], "HTTP status 404: none"),
    ],
)
def test_failures_are_in_the_report(script: Script, message: str) -> None:
    timeout_s = 0.5 if "within 0.5 s" in message else PATIENCE_S
    with scripted(script) as server:
        report = measure(Target(server.url), completions("x", "y"), concurrency=1, timeout_s=timeout_s)
    assert [message in request.error for request in report.requests] == [True, True]
    assert report.output_throughput == 0


def test_nothing_listens() -> None:
    with scripted([]) as server:
        pass
    (request,) = measure(Target(server.url), completions("x")).requests
    assert request.error.startswith("cannot connect")
    with pytest.raises(BenchError, match="cannot connect"):
        client.first_model(Target(server.url))


def test_our_own_server_gives_exact_counts() -> None:
    with real_server(FakeClient()) as port:
        url = f"http://127.0.0.1:{port}"
        target = Target(url, client.first_model(Target(url)))
        prompts = random_texts([4] * 6, 0)
        report = measure(target, completions(*prompts, output_len=20), concurrency=3)
        talk = Conversation("Be brief.", ("Hello", "And now?"), 20)
        chats = measure(target, [talk, talk])
    assert [request.error for request in report.requests] == [""] * 6
    assert {request.completion_tokens for request in report.requests} == {20}
    assert all(request.prompt_tokens > 4 for request in report.requests)
    assert all(request.counted_by == "usage" for request in report.requests)
    assert [request.error for request in chats.requests] == [""] * 4
    first, second = chats.requests[:2]
    assert second.prompt_tokens > first.prompt_tokens + 20, (
        "the second request repeats the first and its answer"
    )


def test_requests_of_an_open_loop_come_when_they_are_due() -> None:
    with scripted(TOKENS) as server:
        report = measure(Target(server.url), completions("a", "b", "c"), arrivals=[0.3, 0.0, 0.1])
        limited = measure(Target(server.url), completions("a", "b"), arrivals=[0.0, 0.0], concurrency=1)
    assert not report.errors + limited.errors
    assert all(
        request.started >= due and request.queued == pytest.approx(0, abs=1)
        for request, due in zip(report.requests, [0.3, 0.0, 0.1], strict=True)
    )
    first, second = limited.requests
    assert second.started >= first.latency and second.queued >= 0.2 and first.queued < second.queued


def test_a_chat_whose_turn_fails_sends_no_more() -> None:
    with scripted([(0.0, b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")]) as server:
        report = measure(Target(server.url), [Conversation("", ("a", "b", "c"), 3)])
    assert len(server.requests) == 1 and len(report.requests) == 3
    assert report.requests[2].error == "not sent, as the turn before it failed"
    assert json.loads(server.requests[0][2])["messages"] == [{"role": "user", "content": "a"}]
