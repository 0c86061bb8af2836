"""`microvllm bench serve`: what it sends, what it prints and writes under vLLM's names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_case import get_command
from fake_client import FakeClient, fresh
from http_tools import real_server

from microvllm import cli
from microvllm.openai_compat.bench import run as bench_run
from microvllm.openai_compat.bench.client import Completion, Measured, RequestResult

SMALL = ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4"]


@pytest.fixture
def client() -> FakeClient:
    return fresh()


@pytest.fixture
def port(client: FakeClient) -> Iterator[str]:
    with real_server(client) as number:
        yield str(number)


def sent(monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, Any]:
    """What would be measured, in place of measuring it."""
    calls: list[dict[str, Any]] = []

    def measure(target: Any, users: Any, **options: Any) -> Measured:
        calls.append({"target": target, "users": users, **options})
        result = RequestResult(latency=0.3, ttft=0.1, itls=[0.1, 0.1], prompt_tokens=8, completion_tokens=3)
        return Measured([result] * len(users), 1.0, 0.0)

    monkeypatch.setattr(bench_run, "measure", measure)
    monkeypatch.setattr(bench_run, "first_model", lambda target: "listed")
    assert cli.run(["bench", "serve", *argv]) == 0
    return calls[-1]


def test_a_chat_benchmark_against_a_server(
    port: str, client: FakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--backend",
        "openai-chat",
        "--port",
        port,
        *SMALL,
        "--max-concurrency",
        "2",
        "--temperature",
        "0",
    ]
    files = [
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(tmp_path / "new"),
        "--metadata",
        "gpu=none",
    ]
    metrics = [
        "--percentile-metrics",
        "ttft,e2el",
        "--metric-percentiles",
        "50,99.9",
        "--goodput",
        "e2el:60000",
    ]
    assert cli.run(["bench", "serve", *flags, *files, *metrics]) == 0
    out = capsys.readouterr().out
    for label in (
        "= Serving Benchmark Result =",
        "Successful requests:                     6 ",
        "Total generated tokens:                  24 ",
        "Mean TTFT (ms):",
        "P99.9 E2EL (ms):",
    ):
        assert label in out, out
    assert "TPOT" not in out
    (file,) = (tmp_path / "new").iterdir()
    result = json.loads(file.read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 24)
    assert (result["model_id"], result["backend"], result["gpu"]) == ("fake-model", "openai-chat", "none")
    assert result["request_goodput"] == result["request_throughput"] and result["p99.9_ttft_ms"] > 0
    assert result["output_lens"] == [4] * 6
    params = [params for _, params, *_ in client.submitted]
    assert len(params) == 6 and all(
        (p.temperature, p.ignore_eos, p.max_tokens) == (0, True, 4) for p in params
    )


def test_lengths_prefix_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    more = [
        "--random-prefix-len",
        "3",
        "--random-range-ratio",
        "0.5",
        "--seed",
        "7",
        "--extra-body",
        '{"min_tokens": 1}',
    ]
    call = sent(
        monkeypatch, "--num-prompts", "40", "--input-len", "8", "--output-len", "4", *more, "--top-k", "5"
    )
    users: list[Completion] = call["users"]
    assert len({tuple(user.prompt[:3]) for user in users}) == 1
    assert {len(user.prompt) for user in users} == {3 + n for n in range(4, 13)}
    assert {user.output_len for user in users} == set(range(2, 7))
    body = json.loads(call["target"].body({"prompt": [1]}, 4))
    assert (body["model"], body["top_k"], body["min_tokens"], body["ignore_eos"]) == ("listed", 5, 1, True)
    assert "temperature" not in body
    again = sent(monkeypatch, "--num-prompts", "40", "--input-len", "8", "--output-len", "4", *more)
    assert again["users"] == users


def test_rate_concurrency_address_and_warmups(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = ["--request-rate", "10", "--burstiness", "2", "--max-concurrency", "3", "--num-warmups", "2"]
    call = sent(monkeypatch, *SMALL, *rate, "--base-url", "http://10.0.0.1:1/v1", "--model", "m")
    assert len(call["arrivals"]) == 6 and call["concurrency"] == 3
    assert (call["target"].url, call["target"].model) == ("http://10.0.0.1:1", "m")


def test_goodput_counts_requests_within_every_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for limits, good in ((["ttft:101", "tpot:101"], 6.0), (["ttft:101", "e2el:299"], 0.0)):
        sent(monkeypatch, *SMALL, "--goodput", *limits, "--save-result", "--result-filename", "r.json")
        assert json.loads((tmp_path / "r.json").read_text())["request_goodput"] == good


def test_requests_that_fail_are_status_1(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--num-prompts", "2", "--random-input-len", "300", "--random-output-len", "4"]
    assert cli.run(["bench", "serve", "--port", port, *lengths]) == 1
    cause, hint = capsys.readouterr().err.splitlines()
    assert "HTTP status 400" in cause and hint.startswith("microvllm: hint: the server's answer says")


def test_the_key_of_a_server_is_read_from_the_environment(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with real_server(client, api_keys=("secret",)) as number:
        argv = ["bench", "serve", "--backend", "openai-chat", "--port", str(number), *SMALL]
        assert cli.run(argv) == 1
        cause, hint = capsys.readouterr().err.splitlines()
        assert "HTTP status 401" in cause and "OPENAI_API_KEY" in hint
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert cli.run(argv) == 0


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ("--backend vllm-chat", "--backend"),
        ("--dataset-name sharegpt", "--dataset-name"),
        ("--endpoint /v1/chat/completions", "--endpoint"),
        ("--request-rate 0", "--request-rate"),
        ("--burstiness x", "--burstiness"),
        ("--percentile-metrics ttft,x", "--percentile-metrics"),
        ("--metric-percentiles 101", "--metric-percentiles"),
        ("--goodput itl:5", "--goodput"),
        ("--goodput ttft", "--goodput"),
        ("--metadata x", "--metadata"),
        ("--num-prompts 0", "--num-prompts"),
    ],
)
def test_what_is_wrong_is_named(argv: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "serve", *argv.split()]) == 2
    cause, hint = capsys.readouterr().err.splitlines()
    assert names in cause and hint.startswith("microvllm: hint: ")


@pytest.mark.parametrize(
    ("argv", "warned"),
    [
        ("--result-dir x --label y", "--result-dir, --label: no effect without --save-result"),
        ("--burstiness 2", "--burstiness has no effect without --request-rate"),
        ("--burstiness 2 --request-rate 3", None),
    ],
)
def test_what_has_no_effect_is_named(
    argv: str, warned: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = get_command(cli.app).commands["bench"].commands["serve"]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_run, "run", lambda args: 0)
        command.main(argv.split(), standalone_mode=False)
    err = capsys.readouterr().err
    assert err == ("" if warned is None else f"microvllm: warning: {warned}\n")


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = (
        "import sys; from microvllm import cli; import microvllm.openai_compat.bench.run\n"
        "cli.run(['bench', 'serve', '--base-url', 'http://127.0.0.1:9'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'starlette'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout == "[]\n" and "cannot connect" in result.stderr
