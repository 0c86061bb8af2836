"""Reads a command's flags as `vllm serve` does, groups its help, and finds the remedy for an error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from microvllm.openai_compat.flags.argv import IGNORE_FLAG, normalise_argv
from microvllm.openai_compat.flags.option_values import OBJECT
from microvllm.runtime.errors import EngineError
from microvllm.runtime.vllm_environment import ignored_variables

PROGRAM = "microvllm"
# The sections of --help, and the parameters in each; any other is in the last one, "Options".
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Model": (
        *("model", "tokenizer", "dtype", "load_format", "gguf_weights", "cpu_activations", "max_model_len"),
        *("hf_overrides", "rope_scaling", "rope_theta", "seed"),
    ),
    "Requests and answers": (
        *("max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos"),
        *("served_model_name", "generation_config", "override_generation_config", "chat_template"),
        *("chat_template_content_format", "default_chat_template_kwargs", "response_role", "max_logprobs"),
        *("logprobs_mode", "max_stop_strings", "return_tokens_as_token_ids", "stream_interval"),
        *("enable_prompt_tokens_details", "enable_force_include_usage", "enable_per_request_metrics"),
        *("sse_keep_alive_interval", "fingerprint_mode", "fingerprint_value", "reasoning_effort_map"),
        "exclude_tools_when_tool_choice_none",
    ),
    "Scheduling and KV cache": (
        *("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"),
        *("queue_timeout", "request_timeout", "scheduling_policy"),
        *("async_scheduling", "enable_prefix_caching", "enable_chunked_prefill"),
        *("long_prefill_token_threshold", "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override"),
    ),
    "Machine": (*("device", "cpu_threads", "attention_backend", "gpu_memory_utilization", "enforce_eager"),),
    "Server": (
        *("host", "port", "uds", "root_path", "shutdown_timeout", "http_timeout_keep_alive"),
        *("http_max_request_body_size", "skip_model_name_validation", "disable_fastapi_docs"),
        *("enable_tokenizer_info_endpoint", "enable_server_load_tracking"),
    ),
    "Access and encryption": (
        *(
            "api_key",
            "api_key_file",
            "allowed_hosts",
            "allowed_origins",
            "allowed_methods",
            "allowed_headers",
            "allow_credentials",
        ),
        *("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"),
        "enable_ssl_refresh",
    ),
    "Logs": (
        *("enable_log_requests", "enable_request_id_headers", "uvicorn_log_level"),
        *("disable_uvicorn_access_log", "disable_access_log_for_endpoints", "disable_log_stats"),
        *("log_level", "log_stats_interval", "log_step_times", "profiler_config"),
    ),
}


class Command(TyperCommand):
    """A Typer command that reads its flags the way `vllm serve` does."""

    def flag_kinds(self) -> dict[str, str]:
        """Each flag of the command, and what `normalise_argv` needs to know of it."""
        kinds = {"--help": "switch", "-h": "switch"}
        for param in self.params:
            kind = "list" if getattr(param, "multiple", False) else "value"
            if getattr(param, "is_flag", False):
                kind = "switch"
            elif param.metavar == OBJECT:
                kind = "json"
            kinds |= {name: kind for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
        return kinds

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        kinds = self.flag_kinds()
        words = normalise_argv(args, kinds, warn)
        if IGNORE_FLAG in kinds and (problem := ignored_variables(os.environ)):
            warn(problem)
        return super().parse_args(ctx, words)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Typer groups with rich alone, which cuts long flags short in 80 columns."""
        section_of = {name: title for title, names in SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {
            title: [] for title in ("Arguments", *SECTIONS, "Options")
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                title = "Arguments" if argument else section_of.get(str(param.name), "Options")
                sections[title].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def warn(message: str) -> None:
    """Print one warning line on stderr."""
    with contextlib.suppress(OSError):  # a full disk
        print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


class LogHandler(logging.StreamHandler[Any]):
    """Writes records to stderr in the form of the command line's own lines."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{PROGRAM}: {level}{super().format(record)}"


def report_error(message: str, remedy: str) -> None:
    """Print the cause of an error and what to do about it, a line each, on stderr."""
    for kind, text in (("error", message), ("hint", remedy)):
        with contextlib.suppress(OSError):
            print(f"{PROGRAM}: {kind}: {' '.join(text.split())}", file=sys.stderr)


def remedy_for(error: Exception, message: str, root: Any, argv: Sequence[str]) -> str:
    """Return one line that says what to do about an error.

    It is the error's own remedy, else the help of the first flag in its `message` that the command has.
    """
    own: str | None = getattr(error, "remedy", None)
    if own is not None:
        return own
    if isinstance(error, EngineError):
        return f"the lines above may say why; `{PROGRAM} collect-env` prints what a bug report needs"
    command: Any = root
    path = PROGRAM
    for word in argv:
        if word not in getattr(command, "commands", {}):
            break
        command, path = command.commands[word], f"{path} {word}"
    more = f"`{path} --help` lists all there is"
    flags = {flag: param for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    for flag in re.findall(r"--[a-z][a-z0-9-]*", message):
        text = getattr(flags.get(flag), "help", None)
        if text:
            return f"{flag}: {text.rstrip('.')}; {more}"
    return more
