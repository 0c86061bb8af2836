"""Inputs that have broken other servers, each against one real server process that must not notice.

`data/bad_inputs.tsv` lists them by number: A transport, B JSON, C prompts, D sampling, E stop strings, F
chat, H other endpoints, I keys, J clients that leave. Every row is tested here, or by the test that
`ELSEWHERE` names; so are ten rules that keep whole classes of them out. After every single input the same
process must give the same bytes for a golden request, with nothing running and every block of the cache free.
"""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from bad_input_cases import (
    CASES,
    CHAT,
    COMPLETIONS,
    HEAD,
    KEY,
    RAW,
    TOKENIZE,
    USER,
    Case,
)
from fake_client import FakeClient
from http_tools import events, eventually, in_process, raw_exchange
from model_tools import ROOT, variant_folder
from process_tools import PATIENCE_S
from test_server_e2e import Server, serve

from microvllm.openai_compat.transport import middleware
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.sampling_checks import check_sampling
from microvllm.runtime.text.input_processor import InputProcessor

AT_ONCE_S = 20.0  # of the server's processor time, for a request that has to be refused at once


class Victim:
    """The server process under fire."""

    def __init__(self, server: Server, log: Path) -> None:
        self.server, self.log = server, log
        self.port = int(server.url.rpartition(":")[2])
        self.http = httpx.Client(
            base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S
        )
        self._golden()  # fills the prefix cache
        self.golden = self._golden()

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, headers={"content-type": "application/json", **headers})

    def check(self) -> None:
        """The process is the same, holds nothing, and gives the golden answer."""
        assert self.server.process.poll() is None
        eventually(self.at_rest, PATIENCE_S)
        assert self._golden() == self.golden

    def at_rest(self) -> bool:
        values = re.findall(
            r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$",
            self.http.get("/metrics").text,
            re.MULTILINE,
        )
        assert len(values) == 3
        return all(float(value) == 0 for value in values)

    def _golden(self) -> bytes:
        body = {"prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, "logprobs": 3}
        answer = self.post(COMPLETIONS, {**body, "ignore_eos": True, "request_id": "golden"})
        assert answer.status_code == 200, answer.text
        return re.sub(rb'"created":\d+', b"", answer.content)

    def processor_s(self) -> float:
        """What the server's own process has taken so far."""
        stat = Path(f"/proc/{self.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    flags = ["--dtype", "float32", "--max-num-seqs", "8", "--num-gpu-blocks-override", "40", "--api-key", KEY]
    flags += ["--tool-call-parser", "hermes"]
    with serve(folder, variant_folder("llama-tied"), *flags) as server:
        victim = Victim(server, folder / "server.log")
        with closing(victim.http):
            yield victim
        said = (folder / "server.log").read_text()
        assert "Traceback" not in said, said[-5000:]


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "victim" in request.fixturenames:
        request.getfixturevalue("victim").check()


# ---- one request, one answer ------------------------------------------------------------------------


def cases_of(row: str) -> list[Case]:
    return [case for case in CASES if case.row == row]


@pytest.mark.parametrize("row", dict.fromkeys(case.row for case in CASES))
def test_answers(victim: Victim, row: str) -> None:
    for case in cases_of(row):
        began = victim.processor_s()
        answer = victim.post(case.path, case.body, **case.headers)
        assert victim.processor_s() - began < AT_ONCE_S
        shown = (case.path, str(case.body)[:200], case.headers, answer.status_code, answer.text[:500])
        assert answer.status_code in case.status, shown
        assert len(answer.content) < 10_000, "the answer repeats the request"
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert list(error) == ["message", "type", "param", "code"], shown
            assert case.param is None or error["param"] == case.param, shown
        if answer.status_code == 401:
            assert answer.json() == {"error": "Unauthorized"}
            assert answer.headers["www-authenticate"] == "Bearer"
        victim.check()


# ---- bytes on a socket ------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "make", "statuses"), RAW, ids=[row for row, _, _ in RAW])
def test_bytes_on_a_socket(victim: Victim, row: str, make: Callable[[], bytes], statuses: set[int]) -> None:
    sent = make()
    before = victim.memory_bytes()
    answer = raw_exchange(victim.port, sent)
    # A connection that is closed while we still write may be reset before its answer is read.
    status = int(answer.split(b" ", 2)[1]) if answer else None
    assert status in statuses or (status is None and len(sent) > 500_000), answer[:300]
    assert victim.memory_bytes() - before < 16 << 20
    assert not re.search(r"^INFO: forged", victim.log.read_text(), re.MULTILINE)


def test_a15_a_body_a_byte_at_a_time(victim: Victim) -> None:
    """Many of them hold nobody up; that each one has a deadline is `test_body_deadline`'s."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\n"
        + HEAD
        + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    )
    with_bodies = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(200)]
    try:
        for count in range(3):
            for sock in with_bodies:
                sock.sendall(head if count == 0 else b"{")
            assert victim.http.get("/health").status_code == 200
            assert victim.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200
    finally:
        for sock in with_bodies:
            sock.close()


def test_a19_a_client_that_leaves_while_it_sends(victim: Victim) -> None:
    before = victim.log.read_text()
    head = (
        b"POST /v1/completions HTTP/1.1\r\n"
        + HEAD
        + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    )
    for part in (head, head + b'{"prompt": "a'):
        with socket.create_connection(("127.0.0.1", victim.port)) as sock:
            sock.sendall(part)
    victim.check()
    assert "Traceback" not in victim.log.read_text()[len(before) :]


# ---- answers that have to be right ------------------------------------------------------------------


def test_d12_penalties_at_their_limits(victim: Victim) -> None:
    prompt = [5, 6, 7] * 34
    for signs in (2.0, -2.0):
        for repetition in (0.01, 100.0):
            body = {"prompt": prompt, "max_tokens": 20, "logprobs": 2, "ignore_eos": True, "temperature": 0.5}
            body |= {"presence_penalty": signs, "frequency_penalty": signs, "repetition_penalty": repetition}
            answer = victim.post(COMPLETIONS, body)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert len(choice["logprobs"]["token_logprobs"]) == 20
            assert all(-9999 <= value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_d24_bad_words_beyond_the_logits(victim: Victim) -> None:
    """D23, D24: what is banned is banned in this request only, and has no id beyond the logits."""
    plain = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    before = victim.post(COMPLETIONS, plain).json()["choices"][0]["text"]
    for word in ("\U0001f600", "\0", "zz" * 60, before):
        assert victim.post(COMPLETIONS, {**plain, "bad_words": [word]}).status_code == 200
    assert victim.post(COMPLETIONS, plain).json()["choices"][0]["text"] == before


def test_d33_no_logprob_is_infinite(victim: Victim) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "logprobs": 5, "allowed_token_ids": [70], "echo": True}
    text = victim.post(COMPLETIONS, body).text
    (choice,) = json.loads(text)["choices"]
    values = choice["logprobs"]["token_logprobs"]
    assert values[0] is None and all(type(value) is float and value <= 0 for value in values[1:])


def test_d36_what_is_ignored_is_not_logged(victim: Victim) -> None:
    size = victim.log.stat().st_size
    for extra in ({"user": "u" * 1_000_000}, {"metadata": {str(i): "m" for i in range(10_000)}}):
        assert victim.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, **extra}).status_code == 200
    assert victim.log.stat().st_size - size < 10_000


def test_e05_a_stop_string_at_the_start(victim: Victim) -> None:
    body = {"prompt": "hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    whole = victim.post(COMPLETIONS, {**body, "min_tokens": 5}).json()["choices"][0]["text"]
    first = next(char for char in whole if char != "\ufffd")
    (choice,) = victim.post(COMPLETIONS, {**body, "stop": [first]}).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == first
    assert choice["text"] == whole[: whole.index(first)]


async def test_f15_a_model_without_a_template() -> None:
    """Over the fake engine, which lets us take its template away; prompts do without one."""
    client = FakeClient()
    client.processor = InputProcessor(client.config, client.tokenizer)  # type: ignore[arg-type, assignment]
    async with in_process(client) as http:
        for path in (CHAT, TOKENIZE):
            answer = await http.post(path, json={"messages": USER})
            assert answer.status_code == 400
            assert "chat template" in answer.json()["error"]["message"]
        assert (await http.post(COMPLETIONS, json={"prompt": "hello"})).status_code == 200


def test_f17_the_newer_limit_wins(victim: Victim) -> None:
    body = {"messages": USER, "max_tokens": 2, "max_completion_tokens": 5, "ignore_eos": True}
    assert victim.post(CHAT, body).json()["usage"]["completion_tokens"] == 5


def long_streams(victim: Victim, count: int, max_tokens: int, prompts: int = 1) -> list[socket.socket]:
    """Clients that have sent a request for a long stream, of the answers to so many prompts."""
    body = json.dumps(
        {"prompt": [[9] * 20] * prompts, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    ).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\n"
        + HEAD
        + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    clients = []
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE_S)
        client.sendall(head % len(body) + body)
        clients.append(client)
    return clients


def test_h06_tokenize_while_the_engine_is_full(victim: Victim) -> None:
    clients = long_streams(victim, 12, 400)
    try:
        for client in clients[:4]:
            assert client.recv(100)
        answer = victim.post(TOKENIZE, {"prompt": "hello"})
        assert answer.status_code == 200 and answer.json()["count"] > 0
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("read", [0, 1, 3000, 12_000])
def test_j01_a_client_that_leaves(victim: Victim, read: int) -> None:
    """Before the first byte, after it, in the middle, near the end; `victim.check` waits for its blocks."""
    (client,) = long_streams(victim, 1, 60)
    seen = 0
    while seen < read and (data := client.recv(min(4096, read - seen))):
        seen += len(data)
    client.close()
    victim.check()
    assert "Traceback" not in victim.log.read_text()


def test_j04_a_client_that_leaves_while_preempted(victim: Victim) -> None:
    """Eight sequences of 420 tokens do not fit into 40 blocks of 16: some are always preempted."""

    def preemptions() -> float:
        found = re.search(
            r"^vllm:num_preemptions_total\{[^}]*\} (\S+)$", victim.http.get("/metrics").text, re.M
        )
        assert found is not None
        return float(found[1])

    before = preemptions()
    # In one request: of several the first may be answered before the last is sent.
    (client,) = long_streams(victim, 1, 400, prompts=8)
    assert client.recv(100)
    eventually(lambda: preemptions() > before, PATIENCE_S)
    client.close()


def test_j09_one_id_used_twice(victim: Victim) -> None:
    body = {"prompt": [9] * 20, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    alone = victim.post(COMPLETIONS, body).json()["choices"][0]["text"]
    (leaver,) = [*long_streams(victim, 1, 400)]
    answers: list[httpx.Response] = []
    ask = threading.Thread(
        target=lambda: answers.append(victim.post(COMPLETIONS, body, **{"x-request-id": "same"}))
    )
    ask.start()
    again = victim.post(COMPLETIONS, body, **{"x-request-id": "same"})
    leaver.close()
    ask.join(PATIENCE_S)
    for answer in (*answers, again):
        assert answer.json()["id"] == "cmpl-same"
        assert answer.json()["choices"][0]["text"] == alone
    assert len(answers) == 1


def test_j11_a_stream_is_the_whole_answer_in_pieces(victim: Victim) -> None:
    body = {"prompt": "The engine", "max_tokens": 30, "n": 3, "seed": 5, "temperature": 1.0}
    body |= {"logprobs": 2, "stop": ["e", "zq"], "ignore_eos": True}
    whole = victim.post(COMPLETIONS, body).json()["choices"]
    parts: list[dict[str, Any]] = [{"text": "", "logprobs": [], "ends": []} for _ in whole]
    for event in events(victim.post(COMPLETIONS, {**body, "stream": True}).text):
        for choice in event["choices"]:
            part = parts[choice["index"]]
            part["text"] += choice["text"]
            part["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
            if choice["finish_reason"] is not None:
                part["ends"].append((choice["finish_reason"], choice["stop_reason"]))
    for choice, part in zip(whole, parts, strict=True):
        assert part["text"] == choice["text"]
        # Which samples share a step is a matter of timing, and sums in another order round otherwise.
        assert part["logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)
        assert part["ends"] == [(choice["finish_reason"], choice["stop_reason"])]


def test_i02_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of comparisons of equally long digests, whatever the token has in common with a key."""
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    guard = middleware.AuthMiddleware(inner, keys=["first", "second", "third"], open_paths=frozenset())
    seen = []
    for token in (b"first", b"third", b"firsx", b"", b"x" * 10_000):
        compared.clear()
        guard._allowed({"headers": [(b"authorization", b"Bearer " + token)]})
        seen.append(list(compared))
    assert seen == [[(32, 32)] * 3] * 5


# ---- ten rules that remove whole classes ------------------------------------------------------------

NUMBERS = [
    field.name
    for field in msgspec.inspect.type_info(SamplingParams).fields  # type: ignore[attr-defined]
    if isinstance(
        getattr(field.type, "types", (field.type,))[0],
        (msgspec.inspect.IntType, msgspec.inspect.FloatType),
    )
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), [1]], ids=repr)
def test_r1_every_number_is_a_finite_number_in_its_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as error:
        check_sampling(SamplingParams(**{"logprobs": 1, name: value}))
    assert error.value.param == name


def test_r2_the_engine_checks_again() -> None:
    """What was not checked on the way in is refused where the engine decodes it."""
    wrong = msgspec.msgpack.encode({"temperature": float("nan")})
    with pytest.raises((InvalidRequestError, msgspec.ValidationError)):
        msgspec.msgpack.decode(wrong, type=SamplingParams)


def test_r10_no_endpoint_opens_an_address() -> None:
    """What runs in the server has no client for any protocol; the command-line tools are clients by trade."""
    modules = {"urllib.request", "requests", "http.client", "ftplib", "aiohttp", "httpx", "openai"}
    reached = {ROOT / "openai_compat" / "app.py"}
    waiting = list(reached)
    while waiting:
        path = waiting.pop()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            assert not modules & set(names), path
            for name in names:
                file = ROOT / Path(*name.split(".")[1:]).with_suffix(".py") if "." in name else ROOT
                if name.startswith("microvllm.") and file.is_file() and file not in reached:
                    reached.add(file)
                    waiting.append(file)
    assert len(reached) > 20


# ---- no row is forgotten ----------------------------------------------------------------------------

ELSEWHERE = {
    "A13": "test_http_server.py::test_half_a_head_is_closed_in_time",
    "H08": "test_heartbeat.py::test_a_step_that_hangs_leaves_its_stacks",
}
RULES = {
    3: "test_process.py::test_what_fails_in_one_stream_stays_there",
    4: "test_layers.py::test_no_assert_no_pickle_no_eval",
    5: "test_http_server.py::test_one_id_used_twice_is_two_requests",
    6: "test_state_machine.py::test_any_life_of_the_engine",
    7: "test_kv_cache.py::test_salts_and_pools_do_not_share",
    8: "test_template_process.py::test_a_bomb_is_answered_and_the_next_request_served",
    9: "test_http_server.py::test_requests_beyond_the_limits_are_refused_and_closed",
}


def test_no_row_is_forgotten() -> None:
    table = (Path(__file__).parent / "data" / "bad_inputs.tsv").read_text().splitlines()[1:]
    rows = {line.split("\t")[0] for line in table}
    own = set(re.findall(r"def test_([a-j]\d\d)_", Path(__file__).read_text(), re.MULTILINE))
    covered = {case.row for case in CASES} | {row for row, _, _ in RAW} | {name.upper() for name in own}
    assert covered | ELSEWHERE.keys() == rows
    rules = set(map(int, re.findall(r"^def test_r(\d+)_", Path(__file__).read_text(), re.MULTILINE)))
    assert rules | RULES.keys() == set(range(1, 11))
    for place in (*ELSEWHERE.values(), *RULES.values()):
        file, _, name = place.partition("::")
        (found,) = Path(__file__).parent.rglob(file)
        assert re.search(rf"def {name}\(", found.read_text()), place
