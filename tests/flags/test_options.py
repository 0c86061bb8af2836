"""What each flag, each variable and each line of a configuration file does."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cli_case import error_line, get_command, own_flags

from microvllm import cli
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs

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
