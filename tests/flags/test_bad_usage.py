"""Whatever is wrong on the command line is one line, a remedy and exit status 2."""

from __future__ import annotations

import errno
import mmap
import socket
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
from cli_case import DEMO, error_line
from http_tools import held_port

from microvllm import cli
from microvllm.adapters.errors import NoMemoryError
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.safetensors_file import SafetensorsFile


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        ("serve", "name one: --model DIR"),
        ("serve no-such-model", "or try the demo model, --model smollm2-135m-instruct"),
        ("serve setup.cfg", "name the folder that holds config.json"),
        ("serve empty", "README.md lists the models that are supported"),
        ("serve m --port 0", "--port: Port to listen on; `microvllm serve --help`"),
        ("serve m --prot 1", "--port: Port to listen on"),
        ("serve m --seed x", "--seed: Default seed"),
        ("serve m --ssl-keyfile k", "--ssl-keyfile: Its key"),
        ("serve m --host no.such.host.invalid", "--host: Address to listen on"),
        ("serve m --uds /no/such/folder/socket", "--uds: Unix socket"),
        (f"serve {DEMO} --device cpu --dtype float16", "use --dtype bfloat16 or float32"),
        (f"serve {DEMO} --device cpu --max-model-len 1M", "--max-model-len auto"),
        (
            f"serve {DEMO} --device cpu --max-model-len 4096 --kv-cache-memory-bytes 1M",
            "raise --kv-cache-memory-bytes",
        ),
        (
            f"serve {DEMO} --device cpu --max-model-len 4096 --num-gpu-blocks-override 8",
            "raise --num-gpu-blocks-override",
        ),
        (f"serve {DEMO} --device cpu --num-gpu-blocks-override 100000000", "lower --kv-cache-memory-bytes"),
        (f"serve {DEMO} --generation-config none", "--generation-config: Sampling defaults"),
        ("serve m --enable-lora", "leave it out, or start without it with --ignore-unsupported-flags"),
        (f"serve {DEMO} --device cpu --rope-theta 1e6", "--rope-theta: The same as"),
        ("generate hello --model no-such-model", "or try the demo model"),
        ("generate", "`microvllm generate --help`"),
        ("run-batch -i none -o out --model m", "`microvllm run-batch --help`"),
        ("chat hello --url http://127.0.0.1:9/v1", "start a server with `microvllm serve`"),
        ("chat hello --url ftp://x", "http://localhost:8000/v1"),
        ("frobnicate", "`microvllm --help`"),
    ],
)
def test_an_error_says_what_to_do(
    argv: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "setup.cfg").touch()
    with held_port() as held:
        port = (
            ("--port", str(held.getsockname()[1]))
            if argv.startswith("serve") and "--port" not in argv
            else ()
        )
        status = cli.run([*argv.split(), *port])
    cause, hint = capsys.readouterr().err.splitlines()
    assert status == (1 if "127.0.0.1:9" in argv else 2)
    assert cause.startswith("microvllm: error: ") and hint.startswith("microvllm: hint: ")
    assert remedy in hint, hint


def test_a_taken_port_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.run(["serve", DEMO, "--port", str(taken.getsockname()[1])]) == 2
    cause, hint = capsys.readouterr().err.splitlines()
    assert "cannot listen on 127.0.0.1" in cause and "choose another address with --port" in hint


def test_what_the_engine_process_reports_keeps_its_remedy() -> None:
    from microvllm.runtime.process.channel import Event, Failed

    sent = msgspec.msgpack.encode(Failed("no memory", "take less"))
    assert msgspec.msgpack.decode(sent, type=Event) == Failed("no memory", "take less")


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["serve"], "no model was given"),
        (["serve", "--model", ""], "no model was given"),
        (["serve", "a", "--model", "b"], "two models"),
        (["serve", "a", "b"], "two models were given: a and b"),
        (["serve", "~no-such-user/x"], "--model '~no-such-user/x'"),
        (["serve", "x" * 5000], "--model 'xxx"),
        (["serve", "nul\0byte"], "--model"),
        (["serve", DEMO, "--tokenizer", "~no-such-user/x"], "--tokenizer '~no-such-user/x'"),
        (["serve", DEMO, "--tokenizer", "x" * 5000], "--tokenizer 'xxx"),
        (["serve", DEMO, "--tokenizer", "no-such-folder"], "--tokenizer no-such-folder: no such folder"),
        (["serve", DEMO, "--generation-config", "x" * 5000], "--generation-config 'xxx"),
        (["serve", DEMO, "--generation-config", "nul\0byte"], "--generation-config"),
        (["serve", "m", "--chat-template", "x" * 5000], "--chat-template 'xxx"),
        (["serve", "m", "--seed", "9223372036854775808"], "--seed"),
        (["serve", "m", "--seed=-9223372036854775809"], "--seed"),
        (["serve", "m", "--cpu-threads", "0"], "--cpu-threads"),
        (["serve", "m", "--cpu-threads", "100000"], "--cpu-threads"),
        (["generate", "", "--model", "no-such-model"], "the prompt is empty"),
        (["serve", "no-such-model"], "no-such-model"),
        (["serve", "m", "--modle", "x"], "did you mean --model"),
        (["serve", "m", "--port", "0"], "--port"),
        (["serve", "m", "--port", "-1"], "--port"),
        (["serve", "m", "--port", "70000"], "--port"),
        (["serve", "m", "--port", "x"], "--port"),
        (["serve", "m", "--port", ""], "--port"),
        (["serve", "m", "--gpu-memory-utilization", "0"], "--gpu-memory-utilization"),
        (["serve", "m", "--gpu-memory-utilization", "-1"], "--gpu-memory-utilization"),
        (["serve", "m", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
        (["serve", "m", "--gpu_memory_utilization=nan"], "--gpu-memory-utilization"),
        (["serve", "m", "-tp", "0"], "--tensor-parallel-size"),
        (["serve", "m", "--distributed-executor-backend", "ray"], "--distributed-executor-backend"),
        (["serve", "m", "--seed", "x"], "--seed"),
        (["serve", "m", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["serve", "m", "--uvicorn-log-level", "loud"], "--uvicorn-log-level"),
        (["serve", "m", "--shutdown-timeout", "nan"], "--shutdown-timeout"),
        (["serve", "m", "--api-key", ""], "--api-key"),
        (["serve", "m", "--root-path", "llm"], "--root-path"),
        (["serve", "m", "--allowed-origins", "https://a.example"], "--allowed-origins"),
        (["serve", "m", "--allowed-origins", "[1]"], "--allowed-origins"),
        (["serve", "m", "--allowed-methods", "[" * 100_000], "--allowed-methods"),
        (["serve", "m", "--sse-keep-alive-interval", "nan"], "--sse-keep-alive-interval"),
        (["serve", "m", "--sse-keep-alive-interval", "-1"], "--sse-keep-alive-interval"),
        (["serve", "m", "--stream-interval", "0"], "--stream-interval"),
        (["serve", "m", "--fingerprint-mode", "odd"], "--fingerprint-mode"),
        (["serve", "m", "--fingerprint-mode", "custom"], "--fingerprint-value"),
        (
            ["serve", "m", "--default-chat-template-kwargs", '{"tokenize": 1}'],
            "--default-chat-template-kwargs",
        ),
        (["serve", "m", "--default-chat-template-kwargs", "[]"], "--default-chat-template-kwargs"),
        (["serve", "m", "--enable-per-request-metrics", "--disable-log-stats"], "--disable-log-stats"),
        (["serve", "m", "--reasoning-effort-map", '{"huge": "low"}'], "--reasoning-effort-map: huge"),
        (["serve", "m", "--reasoning-effort-map.high", "7"], "--reasoning-effort-map: high"),
        (["serve", "m", "--log-level", "loud"], "--log-level"),
        (["serve", "m", "--log-stats-interval", "0"], "--log-stats-interval must be above 0, got 0"),
        (["serve", "m", "--http-timeout-keep-alive", "-1"], "--http-timeout-keep-alive"),
        (["serve", "m", "--http-max-request-body-size", "0"], "--http-max-request-body-size"),
        (["serve", "m", "--ssl-keyfile", "key.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["serve", "m", "--ssl-certfile", "no-such-file"], "--ssl-certfile no-such-file: No such file"),
        (
            ["serve", DEMO, "--override-generation-config.temperature", "9"],
            "--override-generation-config: temperature must be in [0, 2], got 9",
        ),
        (["serve", DEMO, "--override-generation-config.heat", "1"], "--override-generation-config: heat"),
        (["serve", DEMO, "--max-logprobs", "-2"], "--max-logprobs"),
        (["serve", DEMO, "--logprobs-mode", "x"], "--logprobs-mode"),
        (["serve", "m", "--chat-template", "no-such-file"], "no-such-file"),
        (["serve", "m", "--chat-template", "nul\0byte"], "--chat-template"),
        (["serve", "m", "--chat-template", "."], "--chat-template"),
        (["generate"], "prompt"),
        (["generate", "hello"], "no model was given"),
        (["generate", "hello", "--model", "no-such-model"], "no-such-model"),
        (["generate", "hello", "--model", DEMO, "--temperature", "hot"], "--temperature"),
        (["generate", "hello", "--model", DEMO, "--temperature", "nan"], "temperature"),
        (["generate", "hello", "--model", DEMO, "--top-p", "0"], "top_p"),
        (["generate", "hello", "--model", DEMO, "--stop", ""], "stop"),
        (["generate", "hello", "--model", DEMO, "--dtype", "int4"], "--dtype"),
        (["frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_usage_is_a_cause_and_a_remedy(
    argv: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, *argv)
    assert names.lower() in line.lower() and len(line) < 400


@pytest.mark.model
@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ("--max-model-len 0", "--max-model-len"),
        ("--max-model-len 1M", "--max-model-len"),
        ("--dtype int4", "--dtype"),
        ("--load-format pickle", "--load-format"),
        ("--load-format safetensors", "--load-format"),
        ("--load-format fastsafetensors", "--load-format fastsafetensors does not fit"),
        ("--load-format pt", "--load-format pt reads PyTorch's pickled files"),
        ("--gguf-weights 4bit", "--gguf-weights"),
        ("--gguf-weights packed --attention-backend torch", "--gguf-weights packed"),
        ("--cpu-activations int4", "--cpu-activations"),
        ("--cpu-activations int8 --gguf-weights dequantized", "--cpu-activations int8"),
        ("--scheduling-policy random", "--scheduling-policy"),
        ("--attention-backend cuda", "--attention-backend"),
        ("--generation-config no-such-folder", "no-such-folder"),
        ("--tokenizer no-such-folder", "no-such-folder"),
        # A pool smaller than one request: says what is there and what is needed.
        ("--num-gpu-blocks-override 1 --max-model-len 2048", "128 blocks"),
        ("--kv-cache-memory-bytes 1k", "0 blocks, 0 MiB"),
        ("--max-num-seqs 64 --max-num-batched-tokens 32", "--max-num-seqs"),
        ("--host no.such.host.invalid", "--host"),
        ("--uds /no/such/folder/socket", "--uds"),
    ],
)
def test_options_that_do_not_fit_the_model_or_the_machine(
    argv: str, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_port() as held:
        port = str(held.getsockname()[1])
        assert names in error_line(capsys, "serve", "--model", DEMO, "--port", port, *argv.split())


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_a_file_that_memory_is_too_short_for_is_not_called_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reader = tmp_path / f"m.{name}", {"gguf": GGUFFile, "safetensors": SafetensorsFile}[name]
    file.write_bytes(b"GGUF" + bytes(64))
    refused = OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr(mmap, "mmap", Mock(side_effect=refused))
    with pytest.raises(NoMemoryError, match=f"^{file}: cannot be read") as raised:
        reader(file)
    assert raised.value.remedy.startswith("free memory")
