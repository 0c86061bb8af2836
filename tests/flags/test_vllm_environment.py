"""vLLM's environment variables: each is honoured, harmless, or named in one warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_case import error_line, get_command
from fake_client import FakeClient
from http_tools import in_process

from microvllm import cli
from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options import vllm_environment
from microvllm.runtime.options.vllm_environment import VARIABLES, ignored_variables
from microvllm.runtime.rank_layout import rank_layout

HONOURED, HARMLESS, WITHOUT_EFFECT = (
    [name.removeprefix("VLLM_") for name, effect in VARIABLES.items() if effect == wanted]
    for wanted in ("honoured", "harmless", "ignored")
)
# What `serve` passes on: the value of a variable, the field and what it becomes.
OF_THE_SERVER = {
    "API_KEY": ("secret", "api_keys", ("secret",)),
    "HTTP_MAX_REQUEST_BODY_SIZE": ("33554432", "max_body_bytes", 32 << 20),
    "HTTP_TIMEOUT_KEEP_ALIVE": ("90", "http_timeout_keep_alive", 90),
    "LOGGING_LEVEL": ("WARNING", "log_level", "warning"),
    "LOG_STATS_INTERVAL": ("2.5", "stats_interval", 2.5),
    "MAX_STOP_STRINGS": ("8", "max_stop_strings", 8),
    "SERVER_DEV_MODE": ("1", "dev_mode", True),
    "SKIP_MODEL_NAME_VALIDATION": ("true", "skip_model_name_validation", True),
}
OF_THE_ENGINE = {"ALLOW_LONG_MAX_MODEL_LEN", "BATCH_INVARIANT", "CPU_KVCACHE_SPACE"}
OF_EVENTS = {"HOST_IP", "KV_EVENTS_USE_INT_BLOCK_HASHES"}  # tests/kv_events


@pytest.fixture(autouse=True)
def no_variables_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*HONOURED, *HARMLESS, *WITHOUT_EFFECT):
        monkeypatch.delenv(f"VLLM_{name}", raising=False)


def options_of(*argv: str) -> ServerArgs:
    """The server's options of a command line, read as `serve` reads it."""
    command: Any = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    found: list[ServerArgs] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "serve", lambda engine, args, **_: found.append(args))
        with command.make_context("serve", ["m", *argv]) as context:
            command.invoke(context)
    return found[0]


def test_each_variable_is_listed_once() -> None:
    names = [*HONOURED, *HARMLESS, *WITHOUT_EFFECT]
    lines = Path(vllm_environment.__file__).with_suffix(".tsv").read_text("utf-8").splitlines()
    assert len(names) == len(set(names)) == len(lines) - 1 == 303
    assert set(HONOURED) == OF_THE_SERVER.keys() | OF_THE_ENGINE | OF_EVENTS


@pytest.mark.parametrize("name", OF_THE_SERVER)
def test_a_variable_of_the_server_is_an_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, field, wanted = OF_THE_SERVER[name]
    assert getattr(options_of(), field) == getattr(ServerArgs(), field) != wanted
    monkeypatch.setenv(f"VLLM_{name}", value)
    assert getattr(options_of(), field) == wanted


def test_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "90")
    assert options_of("--http-timeout-keep-alive", "7").http_timeout_keep_alive == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_TIMEOUT_KEEP_ALIVE", "soon"),
        ("HTTP_TIMEOUT_KEEP_ALIVE", "-1"),
        ("HTTP_MAX_REQUEST_BODY_SIZE", "0"),
        ("LOGGING_LEVEL", "loud"),
        ("LOG_STATS_INTERVAL", "nan"),
        ("MAX_STOP_STRINGS", "x"),
        ("SERVER_DEV_MODE", "yes"),
        ("SKIP_MODEL_NAME_VALIDATION", "perhaps"),
    ],
)
def test_a_wrong_value_ends_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"VLLM_{name}", value)
    line = error_line(capsys, "serve", "m")
    flag = {"LOGGING_LEVEL": "log-level"}.get(name, name.lower().replace("_", "-"))
    assert f"--{flag}" in line or f"VLLM_{name}" in line


def test_the_variable_of_a_wrong_value_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "loud")
    assert cli.run(["serve", "m"]) == 2
    hint = capsys.readouterr().err.splitlines()[1]
    assert hint.startswith("microvllm: hint: --log-level, or VLLM_LOGGING_LEVEL in the environment: Least")


@pytest.mark.parametrize(("name", "level"), [("WARN", "warning"), ("fatal", "critical"), ("Info", "info")])
def test_levels_have_the_names_of_pythons_logging(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", name)
    assert options_of().log_level == level


def test_what_is_honoured_is_documented() -> None:
    text = (Path(cli.__file__).parent / "docs" / "http.md").read_text()
    assert [name for name in HONOURED if f"`VLLM_{name}`" not in text] == []


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    return tmp_path


def test_a_longer_context_than_the_model_was_trained_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = EngineArgs(model=str(folder), max_model_len=128, device="cpu", attention_backend="torch")
    with pytest.raises(ConfigError, match="VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"):
        args.resolve()
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert args.resolve().max_model_len == 128
    assert "exceeds the model's context of 64 tokens" in caplog.text


def test_the_size_of_the_cache_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(model=str(folder), device="cpu", attention_backend="torch")
    monkeypatch.setattr("microvllm.runtime.kv_memory.available_memory", lambda: 8 << 30)
    default = args.resolve()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    config = args.resolve()
    block_bytes = rank_layout(config).page_bytes
    assert config.num_blocks == (2 << 30) // block_bytes != default.num_blocks
    for wrong in ("-1", "1.5", "x"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", wrong)
        with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE"):
            args.resolve()


async def test_any_model_name_is_taken() -> None:
    body = {"model": "anything", "prompt": "hi", "max_tokens": 1}
    for skip in (False, True):
        async with in_process(FakeClient(), skip_model_name_validation=skip) as http:
            for path in ("/v1/completions", "/tokenize"):
                answer = await http.post(path, json=body)
                assert answer.status_code == (200 if skip else 404)
                assert not skip or answer.json().get("model") != "anything"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_does_nothing_here_is_named(name: str) -> None:
    assert ignored_variables({f"VLLM_{name}": "1", "HOME": "/"}) == (
        f"environment variables without effect here: VLLM_{name}"
    )


def test_one_line_names_all_and_a_mistyped_one() -> None:
    found = dict.fromkeys(("VLLM_PLUGINS", "VLLM_DEBUG_DUMP_PATH", "VLLM_HTTP_TIMEOUT_KEEPALIVE"), "1")
    assert ignored_variables(found) == (
        "environment variables without effect here: VLLM_DEBUG_DUMP_PATH, VLLM_HTTP_TIMEOUT_KEEPALIVE, "
        "VLLM_PLUGINS (VLLM_HTTP_TIMEOUT_KEEPALIVE is none of vLLM's; VLLM_HTTP_TIMEOUT_KEEP_ALIVE is)"
    )
    assert ignored_variables({f"VLLM_{name}": "1" for name in (*HONOURED, *HARMLESS)}) is None


def test_commands_that_load_a_model_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_DEBUG_DUMP_PATH", "1")
    monkeypatch.setenv("VLLM_PORT_8000_TCP", "tcp://10.0.0.1")
    for argv in (["serve"], ["generate", "hi"], ["run-batch", "-i", "a", "-o", "b"]):
        assert cli.run(argv) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "VLLM_" in line]
        assert len(lines) == 1 and lines[0].startswith("microvllm: warning: ")
        assert "VLLM_DEBUG_DUMP_PATH, VLLM_PORT_8000_TCP" in lines[0]
    assert cli.run(["chat", "--xyz"]) == 2
    assert "VLLM_" not in capsys.readouterr().err
    monkeypatch.delenv("VLLM_DEBUG_DUMP_PATH")
    line = error_line(capsys, "serve", "m", "--fail-on-environ-validation")
    assert "vLLM does not know VLLM_PORT_8000_TCP" in line
    assert vllm_environment.unknown_variables({"VLLM_PLUGINS": "", "VLLM_API_KEY": ""}) == []
