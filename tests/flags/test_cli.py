"""The command line: what each flag does, and that whatever is wrong is one line and exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main
from http_tools import held_port
from process_tools import alive, wait_until
from typer.testing import CliRunner

from microvllm import cli
from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.flags.argv import UsageError, normalise_argv
from microvllm.openai_compat.flags.progress import ProgressLine
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import EngineError
from microvllm.runtime.flag import SECTIONS, human_int
from microvllm.runtime.process import spawn

MICROVLLM = str(Path(sys.executable).with_name("microvllm"))
DEMO = "smollm2-135m-instruct"
AT_ONCE_S = 30.0  # of processor time; one or two of them, or five where modules have to be compiled first
OWN = {
    "--model": "value",
    "--port": "value",
    "--names": "list",
    "--object": "json",
    "--eager": "switch",
    "--no-eager": "switch",
    "-h": "switch",
    "-r": "value",
    "--ignore-unsupported-flags": "switch",
}


get_command = functools.cache(typer.main.get_command)


@pytest.fixture(scope="module", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer makes the commands anew out of the signatures for each `cli.run`, which is most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", get_command)
        yield


def normalise(*argv: str) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return normalise_argv(argv, OWN, warnings.append), warnings


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[EngineArgs, ServerArgs]]]:
    """Collects what `serve` was about to start, in place of starting it."""
    calls: list[tuple[EngineArgs, ServerArgs]] = []
    for name in ("MICROVLLM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spawn, "SpawnedEngine", lambda cpu_threads: contextlib.nullcontext())
    monkeypatch.setattr(server, "serve", lambda config, args, **_: calls.append((config, args)))
    yield calls


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail with status 2 and two lines, cause and remedy; the cause is returned."""
    assert cli.run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("microvllm: warning: ")]
    assert len(lines) == 2 and lines[0].startswith("microvllm: error: "), err
    assert lines[1].startswith("microvllm: hint: ") and len(lines[1]) < 400, err
    return lines[0]


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
        (f"serve {DEMO} --device cpu --rope-theta 1e6", "--hf-overrides: Values in place"),
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


class TestNormalise:
    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["m", "--port", "1"], ["m", "--port=1"]),
            (["--port=1", "m"], ["--port=1", "m"]),
            (["--no_eager"], ["--no-eager"]),
            (["--port", "-1"], ["--port=-1"]),
            (["--port", "-1.5k"], ["--port=-1.5k"]),
            (["--model", "-a b"], ["--model=-a b"]),
            (["--model=a=b_c"], ["--model=a=b_c"]),
            (["--model={{ a }} b"], ["--model={{ a }} b"]),
            (["--model="], ["--model="]),
            (["--names", "a", "b", "--port", "1", "m"], ["--names=a", "--names=b", "--port=1", "m"]),
            (["--names=a", "b"], ["--names=a", "--names=b"]),
            (["--", "--unknown"], ["--", "--unknown"]),
            (["--help=all"], ["--help"]),
            (["-h"], ["-h"]),
            (["-r", "a b", "-r=-c"], ["-r", "a b", "-r", "-c"]),
            (["-dcp", "1"], []),
            (["--nnodes=1", "-pp=1", "-asc", "1"], []),
            (["--object", '{"a": 1}'], ['--object={"a": 1}']),
            (["--object.top_p", "0.5"], ['--object={"top_p": 0.5}']),
            (["--object.a.b=x", "--object.a.c", "[1]", "m"], ["m", '--object={"a": {"b": "x", "c": [1]}}']),
            (["--object", '{"a": 1, "b": 2}', "--object.a", "3"], ['--object={"a": 3, "b": 2}']),
            (["--object.a", "1", "--", "--x"], ['--object={"a": 1}', "--", "--x"]),
        ],
    )
    def test_own_flags(self, argv: list[str], expected: list[str]) -> None:
        assert normalise_argv(argv, OWN | {"--help": "switch"}, pytest.fail) == expected

    @pytest.mark.parametrize(
        "argv",
        [
            ["--swap-space", "4"],
            ["--swap_space=4"],
            ["--no-enable-eplb"],
            ["--disable-eplb"],
            ["-O3"],
            ["-O", "2"],
            ["-O=2"],
            ["-cc", '{"mode": 3}'],
            ["-cc.mode", "3"],
            ["--compilation-config.pass_config.fuse=true"],
            ["--cudagraph-capture-sizes", "1", "2", "4"],
            ["-ep"],
            ["-dpa", "10.0.0.1"],
            ["-ac.backend", "FLASH_ATTN"],
            ["--hf-token"],
            ["--hf-token", "secret"],
            ["--hf-token=secret"],
        ],
    )
    def test_a_flag_of_vllm_without_effect_is_dropped_with_its_value(self, argv: list[str]) -> None:
        left, warnings = normalise("m", *argv, "--port", "1")
        assert left == ["m", "--port=1"]
        assert len(warnings) == 1 and "\n" not in warnings[0] and warnings[0].startswith("--")

    @pytest.mark.parametrize(
        ("argv", "problem"),
        [
            (["--prot", "1"], "unknown flag --prot, did you mean --port?"),
            (["--xyzzy"], "unknown flag --xyzzy"),
            (["-x"], "unknown flag -x"),
            (["--port"], "--port needs a value"),
            (["--port", "--eager"], "--port needs a value"),
            (["--eager=yes"], "--eager takes no value"),
            (["--names"], "--names needs a value"),
            (["--swap-space"], "--swap-space needs a value"),
            (["-pp", "2"], "--pipeline-parallel-size 2 (it would spread one model"),
            (["--pipeline_parallel_size=x"], "--pipeline-parallel-size x (it would spread"),
            (["-asc=0"], "--api-server-count 0 (it would answer from several API processes"),
            (["-n", "2"], "--nnodes 2 (it would spread"),
            (["-dcp", "2"], "--decode-context-parallel-size 2 (it would"),
            (["--object", "7"], "--object needs a JSON object, got '7'"),
            (["--object", "{a"], "--object needs a JSON object, got '{a'"),
            (["--object.a"], "--object.a needs a value"),
            (["--model.a", "1"], "unknown flag --model.a"),
        ],
    )
    def test_wrong_flags(self, argv: list[str], problem: str) -> None:
        with pytest.raises(UsageError, match=re.escape(problem)):
            normalise(*argv)


@functools.cache
def own_flags() -> dict[str, str]:
    """Flag -> parameter name of `serve`."""
    command = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return {
        name: param.name
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--") and name != "--help"
    }


def command_param(flag: str) -> Any:
    """The option of `serve` that a flag belongs to."""
    command = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return next(param for param in command.params if flag in (*param.opts, *param.secondary_opts))


NOT_DEFAULT = {
    "port": "8001", "dtype": "float32", "max_model_len": "512", "uvicorn_log_level": "error",
    "log_level": "error", "chat_template": "{{ messages }}", "scheduling_policy": "priority",
    "cpu_threads": "1", "gguf_weights": "packed", "cpu_activations": "int8", "device": "cpu",
    "quantization": "awq", "quantization_config": '{"linear": "fp8_per_block"}',
    "distributed_executor_backend": "mp",
    "chat_template_content_format": "openai",
    "runner": "pooling", "convert": "embed", "pooler_config": '{"pooling_type": "MEAN"}',
    "ssl_cert_reqs": "2", "gpu_memory_utilization": "0.5",
    "reasoning_effort_map": '{"high": "max"}',
    "kv_events_config": '{"enable_kv_cache_events": true}',
    "hf_overrides": '{"rope_theta": 7}', "rope_scaling": '{"rope_type": "linear", "factor": 2}',
    "override_generation_config": '{"top_k": 7}', "logprobs_mode": "raw_logits", "root_path": "/llm",
    "default_chat_template_kwargs": '{"enable_thinking": false}', "allowed_origins": '["https://a.example"]',
    "allowed_hosts": '["llm.example"]',
    "allowed_methods": '["GET"]', "allowed_headers": '["x-a"]', "fingerprint_mode": "none",
    "tool_call_parser": "hermes", "reasoning_parser": "qwen3",
    "profiler_config": json.dumps({"profiler": "torch", "torch_profiler_dir": tempfile.gettempdir()}),
}  # fmt: skip
# What some flags cannot do without.
CERTIFICATE = ("--ssl-certfile", "cert.pem")
TOGETHER = {
    "fingerprint_value": ("--fingerprint-mode", "custom", "--fingerprint-value", "old"),
    "ssl_keyfile": CERTIFICATE,
    "ssl_ca_certs": CERTIFICATE,
    "ssl_cert_reqs": (*CERTIFICATE, "--ssl-ca-certs", "ca.pem"),
    "ssl_ciphers": CERTIFICATE,
    "enable_ssl_refresh": CERTIFICATE,
}


# Flags that say how the others are read, or whose value is a file.
NOT_OPTIONS = ("--model", "--config", "--api-key-file", "--ignore-unsupported-flags")
NOT_OPTIONS += ("--no-ignore-unsupported-flags",)
NOT_OPTIONS += ("--fail-on-environ-validation", "--no-fail-on-environ-validation")


@pytest.mark.parametrize("flag", [flag for flag in own_flags() if flag not in NOT_OPTIONS])
def test_every_flag_reaches_its_option(flag: str, launched: list[Any]) -> None:
    """Given a value that is not the default, exactly one field of EngineArgs or ServerArgs changes."""
    name = own_flags()[flag]
    command = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    param = next(param for param in command.params if param.name == name)
    value = [] if param.is_flag else [NOT_DEFAULT.get(name, "7")]
    together = TOGETHER.get(str(name), ())
    assert cli.run(["serve", "m", *together]) == 0
    assert cli.run(["serve", "m", *together, flag, *value]) == 0
    plain, given = ({**dataclasses.asdict(e), **dataclasses.asdict(s)} for e, s in launched)
    changed = {key for key in plain if plain[key] != given[key]}
    is_default = param.is_flag and (flag in param.opts) is param.default
    assert len(changed) == (0 if is_default else 1), changed
    if changed and name in given:
        assert changed == {name}


def test_defaults_are_those_of_the_engine_and_the_server(launched: list[Any]) -> None:
    assert cli.run(["serve", "--model", "m"]) == 0
    assert launched == [(EngineArgs(model="m"), ServerArgs())]


def test_every_engine_option_has_a_flag() -> None:
    names = set(own_flags().values())
    assert {field.name for field in dataclasses.fields(EngineArgs)} <= names


def test_spellings_reach_the_options(launched: list[Any], tmp_path: Path) -> None:
    template = tmp_path / "chat template.jinja"
    template.write_text("{{ messages[0].content }}é", "utf-8")
    argv = (
        "serve --served_model_name a b --max-num-batched-tokens=25.6k --kv_cache_memory_bytes 1G "
        "--no-enable_prefix_caching --api-key k1 k2 --max-model-len 2K --model m"
    ).split()
    assert cli.run([*argv, "--chat-template", str(template)]) == 0
    (engine, http), = launched  # fmt: skip
    assert http.served_model_names == ("a", "b") and http.api_keys == ("k1", "k2")
    assert engine.max_num_batched_tokens == 25600 and engine.kv_cache_memory_bytes == 1 << 30
    assert engine.max_model_len == 2048 and engine.enable_prefix_caching is False
    assert http.chat_template == "{{ messages[0].content }}é"


def test_keys_from_a_file(launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert cli.run(["serve", "m", "--api-key-file", str(file), "--api-key", "three"]) == 0
    assert launched[0][1].api_keys == ("three", "one", "two")
    file.write_text("\n")
    assert "holds no key" in error_line(capsys, "serve", "m", "--api-key-file", str(file))
    missing = str(tmp_path / "none")
    assert f"--api-key-file {missing}: No such file" in error_line(
        capsys, "serve", "m", "--api-key-file", missing
    )


class TestConfigFile:
    def serve(self, folder: Path, content: str, *argv: str, name: str = "serve.yaml") -> int:
        (folder / name).write_text(content, "utf-8")
        return cli.run(["serve", "--config", str(folder / name), *argv])

    def test_its_options_are_taken(self, launched: list[Any], tmp_path: Path) -> None:
        content = """
            model: the-model
            port: 12323
            served_model_name: [a, b]
            enable-prefix-caching: false
            enable_log_requests: true
            max-model-len: 2k
            allowed-origins: ["https://a.example"]
            override-generation-config: {temperature: 0.5, top_k: 7}
            chat-template: |
              {{ messages }}
              end
        """
        assert self.serve(tmp_path, content) == 0
        (engine, http), = launched  # fmt: skip
        assert (engine.model, engine.enable_prefix_caching, engine.max_model_len) == (
            "the-model",
            False,
            2000,
        )
        assert (http.port, http.served_model_names, http.enable_log_requests) == (12323, ("a", "b"), True)
        assert engine.override_generation_config == {"temperature": 0.5, "top_k": 7}
        assert http.allowed_origins == ("https://a.example",)
        assert http.chat_template == "{{ messages }}\nend\n"

    def test_the_command_line_wins(self, launched: list[Any], tmp_path: Path) -> None:
        content = (
            "model: a\nport: 1\napi-key: [x, y]\nasync-scheduling: true\n"
            "override-generation-config: {top_k: 7}\nseed: 5"
        )
        argv = ["b", "--port", "2", "--api-key", "z", "--no-async-scheduling"]
        assert self.serve(tmp_path, content, *argv, "--override-generation-config.top_p", "0.5") == 0
        (engine, http), = launched  # fmt: skip
        assert (engine.model, engine.seed, engine.async_scheduling) == ("b", 5, False)
        assert (http.port, http.api_keys) == (2, ("z",))
        assert engine.override_generation_config == {"top_p": 0.5}

    def test_flags_of_vllm_without_effect_warn(
        self, launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = "model: m\nswap-space: 4\ncompilation-config: {mode: 3}\ncudagraph-capture-sizes: [1, 2]"
        assert self.serve(tmp_path, content) == 0
        assert len(capsys.readouterr().err.splitlines()) == 3 and len(launched) == 1

    def test_an_empty_file_is_no_option(self, launched: list[Any], tmp_path: Path) -> None:
        assert self.serve(tmp_path, "# nothing\n", "m") == 0
        assert launched == [(EngineArgs(model="m"), ServerArgs())]

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("prot: 1", "serve.yaml: prot: unknown flag --prot, did you mean --port?"),
            ("port:", "serve.yaml: port: has no value"),
            ("port: x", "--port"),
            ("port: true", "serve.yaml: port: --port needs a value"),
            ("enable-prefix-caching: 5", "enable-prefix-caching: --enable-prefix-caching takes no value"),
            ("pipeline-parallel-size: 2", "--pipeline-parallel-size 2 (it would spread"),
            ("config: other.yaml", "serve.yaml: config: a file cannot name another one"),
            ("override-generation-config: 5", "override-generation-config needs a JSON object"),
            ("override-generation-config: {a: 2020-01-01}", "cannot be written as JSON"),
            ("- a\n- b", "serve.yaml: must hold names of options"),
            ("5: a", "serve.yaml: must hold names of options"),
            ("a: [", "serve.yaml: not readable as YAML"),
            ("a: !!python/object:os.system x", "serve.yaml: not readable as YAML"),
            ("a: " + "[" * 5000, "serve.yaml: not readable as YAML"),
            ("a: \0", "serve.yaml: not readable as YAML"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.serve(tmp_path, content, "m") == 2
        line, hint = capsys.readouterr().err.splitlines()
        assert problem in line and hint.startswith("microvllm: hint: ")

    @pytest.mark.parametrize(
        ("argv", "problem"),
        [
            (["--config"], "--config needs a value"),
            (["--config", "none.yaml"], "--config none.yaml: No such file"),
            (["--config", "none.json"], "--config none.json: must be a .yaml or .yml file"),
            (["--config", "nul\0.yaml"], "--config"),
            (["--config", "a.yaml", "--config", "b.yaml"], "--config was given more than once"),
        ],
    )
    def test_wrong_files(self, argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert problem in error_line(capsys, "serve", "m", *argv)


@pytest.mark.parametrize("wish", ["0", "1"])
def test_developer_mode_comes_from_the_environment(
    wish: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", wish)
    assert cli.run(["serve", "m"]) == 0
    assert launched[0][1].dev_mode is (wish == "1")


def test_a_wrong_developer_mode_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "yes")
    assert "VLLM_SERVER_DEV_MODE" in error_line(capsys, "serve", "m")


def test_the_number_of_stop_strings(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["serve", "m"]) == 0
    assert cli.run(["serve", "m", "--max-stop-strings", "6"]) == 0
    monkeypatch.setenv("VLLM_MAX_STOP_STRINGS", "8")
    assert cli.run(["serve", "m"]) == 0
    assert [http.max_stop_strings for _, http in launched] == [4, 6, 8]


@pytest.mark.parametrize("text", ["auto", "-1"])
def test_context_length_left_to_us(text: str, launched: list[Any]) -> None:
    assert cli.run(["serve", "m", "--max-model-len", text]) == 0
    assert launched[0][0].max_model_len is None


@pytest.mark.parametrize("variable", ["MICROVLLM_API_KEY", "VLLM_API_KEY"])
def test_api_key_from_the_environment(
    variable: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "secret")
    assert cli.run(["serve", "m"]) == 0
    assert cli.run(["serve", "m", "--api-key", "other"]) == 0
    assert [http.api_keys for _, http in launched] == [("secret",), ("other",)]


def test_same_model_twice_is_one(launched: list[Any]) -> None:
    assert cli.run(["serve", "m", "--model", "m"]) == 0
    assert launched[0][0].model == "m"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("4096", 4096), (" 8 ", 8), ("-1", -1)),
        *(
            ("1k", 1000),
            ("25.6k", 25600),
            ("4.35k", 4350),
            ("1.1m", 1_100_000),
            ("1g", 10**9),
            ("1t", 10**12),
        ),
        *(("1K", 1 << 10), ("2M", 2 << 20), ("3G", 3 << 30), ("1T", 1 << 40)),
    ],
)
def test_human_int(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.5K", "1kk", "1e3", "0x10", "1.0001k", "nan", "inf", "²", "1 k"]
)
def test_not_a_human_int(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "serve", "m", f"--max-num-batched-tokens={text}")
    assert "--max-num-batched-tokens" in line


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


def start(*argv: str, **env: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the console script in a process of its own; the seconds are processor time.

    A busy machine must not fail a test, so "at once" is measured in work done and the timeout is long.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [MICROVLLM, *argv],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("optimize", ["", "2"])
def test_the_console_script(optimize: str) -> None:
    """Also with asserts and docstrings compiled away: no check may be one, no command may need the others."""
    for argv, names in (
        (["serve", "--modle", "x"], "--model"),
        (["serve", "x", "--port", "70000"], "--port"),
        (["serve", "x", "--gpu-memory-utilization", "nan"], "--gpu-memory-utilization"),
        (["serve", "/no/such/model"], "/no/such/model"),
    ):
        result, seconds = start(*argv, PYTHONOPTIMIZE=optimize)
        assert (result.returncode, result.stdout) == (2, "")
        assert names in result.stderr and result.stderr.count("\n") == 2
        assert seconds < AT_ONCE_S


@pytest.mark.model
def test_a_taken_port_is_known_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result, seconds = start("serve", "--model", DEMO, "--port", str(port))
    assert result.returncode == 2 and str(port) in result.stderr and result.stderr.count("\n") == 2
    assert "Loading" not in result.stdout + result.stderr
    assert seconds < AT_ONCE_S


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    result, seconds = start("serve", "--help")
    assert result.returncode == 0 and seconds < 6
    for flag in own_flags():
        assert flag in result.stdout
    code = (
        "import sys; from microvllm import cli; status = cli.run(['serve', '--help'])\n"
        "print(status, sorted({'torch', 'transformers', 'numpy', 'starlette'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.endswith("0 []\n")


def test_help_explains_the_backends() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["serve", "--help"]).output.split())
    for words in ("cpu, our kernels in C", "torch, PyTorch's own operators", "auto, cpu where"):
        assert words in text


def test_help_is_in_sections_and_names_each_flag_once() -> None:
    text = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    titles = re.findall(r"^(\w[\w ]*):$", text, re.M)
    assert titles[:3] == ["Arguments", "Model", "Requests and answers"] and titles[-1] == "Options"
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(?: / (--[a-z-]+))?", text, re.M)
    flags = [flag for pair in listed for flag in pair if flag]
    assert sorted(flags) == sorted({*flags, *own_flags(), "--help"})
    own = set(own_flags().values())
    params = get_command(cli.app).commands["serve"].params  # type: ignore[attr-defined]
    known = {param.name for param in params if getattr(param, "rich_help_panel", None) in SECTIONS}
    assert len(known & own) > 60
    assert own - known == {"config", "ignore_unsupported_flags", "fail_on_environ_validation"}


def test_without_arguments_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: microvllm" in out and "collect-env" in out and err == ""


def test_version_and_help() -> None:
    runner = CliRunner()
    assert re.fullmatch(r"microvllm \d+\.\d+\.\d+\n", runner.invoke(cli.app, ["--version"]).output)
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and "serve" in result.output and "generate" in result.output
    assert "--max-tokens" in runner.invoke(cli.app, ["generate", "--help"]).output


def test_an_engine_that_fails_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("the engine process ended with signal 9")

    monkeypatch.setattr(server, "serve", fail)
    assert cli.run(["serve", "m"]) == 1
    cause, hint = capsys.readouterr().err.splitlines()
    assert cause == "microvllm: error: the engine process ended with signal 9"
    assert "`microvllm collect-env`" in hint


def test_load_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine() as progress:
        for done in range(1, 101):
            progress("Loading weights", done, 100)
        progress("Nothing", 0, 0)
        for done in range(3):
            progress("Capturing CUDA graphs", done, 3)
        progress("Capturing CUDA graphs", 3, 3, "Captured 3 graphs in 4.2 s, 1.1 GB")
        progress("Warming up", 0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        *(f"microvllm: Loading weights: {share} %" for share in (25, 50, 75, 100)),
        *(f"microvllm: Capturing CUDA graphs: {share} %" for share in (0, 25, 50)),
        "microvllm: Captured 3 graphs in 4.2 s, 1.1 GB",
        "microvllm: Warming up: 0 %",
    ]


def test_load_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressLine() as progress:
        progress("Loading weights", 1, 2)
        progress("Loading weights", 2, 2)
        progress("Capturing CUDA graphs", 0, 35)
        progress("Capturing CUDA graphs", 34, 35)
        progress("Capturing CUDA graphs", 35, 35, "Captured 35 graphs in 4.2 s, 1.1 GB")
    shown = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in re.split("[\r\n]", shown) if line.strip()]
    assert re.match(
        r"Loading weights .* 2/2 100 % 0:\d\d:\d\d", [line for line in lines if "weights" in line][-1]
    )
    assert re.match(r"Captured 35 graphs in 4.2 s, 1.1 GB .* 35/35 100 % 0:\d\d:\d\d", lines[-1])


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_everything(number: signal.Signals) -> None:
    port = held_port()
    process = subprocess.Popen(
        [MICROVLLM, "serve", "--model", DEMO, "--port", str(port.getsockname()[1])],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        # It has a handler an instant after it has started the engine; before, SIGTERM ends it like any other.
        wait_until(lambda: catches(process.pid, signal.SIGTERM), "there is an engine process, and a handler")
        engine = children(process.pid)
        assert engine
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        port.close()
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    wait_until(lambda: not any(map(alive, engine)), "the engine process is gone")


@pytest.mark.model
def test_generate_streams_to_the_terminal() -> None:
    argv = (
        "generate",
        "The capital of France is",
        "--model",
        DEMO,
        "--max-tokens",
        "8",
        "--temperature",
        "0",
    )
    result, _ = start(*argv, "--stop", ".", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == " Paris\n"
