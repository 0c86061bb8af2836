"""The flags of `vllm serve` 0.33 on our command line: their spellings, and those that do nothing here.

A script written for vLLM starts unchanged: `_` and `-` are the same, `-tp` is short for
`--tensor-parallel-size`, a flag may take several values, and a flag that is known but not implemented
is dropped with a warning. A flag that vLLM does not know either is an error.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence

from microvllm.runtime.errors import ConfigError

# Flags of `vllm serve` that are known here but do nothing. With one of them a script written for vLLM
# still starts; a warning line says what it does not get.
IGNORED_VALUE_FLAGS = """
    additional-config allowed-headers allowed-methods allowed-origins api-server-count
    chat-template-content-format code-revision compilation-config config config-format cpu-offload-gb
    cudagraph-capture-sizes default-chat-template-kwargs device disable-access-log-for-endpoints
    distributed-executor-backend download-dir fingerprint-mode gpu-memory-utilization
    guided-decoding-backend h11-max-header-count h11-max-incomplete-event-size hf-config-path
    hf-overrides hf-token kv-cache-dtype kv-transfer-config limit-mm-per-prompt log-config-file
    logits-processors logprobs-mode lora-modules max-cudagraph-capture-size max-log-len max-logprobs
    max-lora-rank max-loras max-num-queued-tokens max-num-scheduled-tokens
    max-parallel-loading-workers max-seq-len-to-capture middleware mm-processor-kwargs model-impl
    model-loader-extra-config num-scheduler-steps optimization-level otlp-traces-endpoint
    override-generation-config performance-mode preemption-mode prefix-caching-hash-algo
    profiler-config quantization reasoning-parser revision rope-scaling root-path
    scheduler-cls speculative-config speculative-model spec-method spec-model spec-tokens
    sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-keyfile stream-interval
    structured-outputs-config swap-space task tokenizer-mode tokenizer-revision tool-call-parser
    tool-parser-plugin worker-cls
""".split()
IGNORED_SWITCHES = """
    allow-credentials calculate-kv-scales disable-cascade-attn disable-custom-all-reduce
    disable-fastapi-docs disable-frontend-multiprocessing disable-log-requests
    disable-sliding-window enable-auto-tool-choice enable-expert-parallel
    enable-log-outputs enable-log-requests enable-lora
    enable-per-request-metrics enable-prompt-embeds enable-reasoning
    enable-request-id-headers enable-server-load-tracking enable-sleep-mode enable-ssl-refresh
    enable-tokenizer-info-endpoint enforce-eager grpc headless return-tokens-as-token-ids
    skip-tokenizer-init trust-remote-code trust-request-chat-template use-v2-block-manager
    worker-use-ray
""".split()
# Of the flags above those that vLLM reads with several values after one flag.
IGNORED_LISTS = ("cudagraph-capture-sizes", "lora-modules", "logits-processors")
# Refused unless 1: a user who asks for two GPUs must not be served by less without noticing.
PARALLEL_FLAGS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
SHORT_FLAGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-asc": "--api-server-count",
    "-cc": "--compilation-config",
    "-sc": "--speculative-config",
    "-q": "--quantization",
    "-O": "--optimization-level",
}
IGNORED_BECAUSE = {
    "gpu-memory-utilization": "has no effect on a CPU; --kv-cache-memory-bytes sets the size of the KV cache",
    "enforce-eager": "has no effect on a CPU: there are no CUDA graphs, every step is eager",
    "trust-remote-code": "is ignored: code that comes with a model is never run",
    "ssl-keyfile": "is ignored: connections are NOT encrypted, put a TLS proxy in front",
    "ssl-certfile": "is ignored: connections are NOT encrypted, put a TLS proxy in front",
    "revision": "is ignored: models are never downloaded, a path is what it is",
}


class UsageError(ConfigError):
    """A flag is unknown, lacks its value or has a wrong one."""


def normalise_argv(argv: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    """Bring vLLM's spellings of flags into the one form that Typer reads.

    `own` maps each flag of the command to its kind: "value", "list" (several values) or "switch". In
    the result underscores in flag names are dashes, each value is joined to its flag with "=", a list
    flag is repeated for each value, and vLLM's flags that have no effect here are gone, each reported
    to `warn`. Raises `UsageError` for a flag that is unknown or lacks its value.
    """
    out: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*out, token, *rest]
        if not _is_flag(token):
            out.append(token)
            continue
        flag, value = _split_flag(token)
        kind = own.get(flag) or _ignored_kind(flag)
        if kind is None:
            raise UsageError(_unknown_flag(flag, own))
        if kind == "switch" and value is not None:
            raise UsageError(f"{flag} takes no value, got {value!r}")
        values = [] if value is None else [value]
        if kind != "switch" and not values:
            if not rest or _is_flag(rest[0]):
                raise UsageError(f"{flag} needs a value")
            values.append(rest.pop(0))
        while kind == "list" and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        if flag in own:
            out += [f"{flag}={value}" for value in values] or [flag]
        else:
            _check_ignored(flag, values)
            if flag.removeprefix("--") not in PARALLEL_FLAGS:
                warn(_ignored_warning(flag))
    return out


def _is_flag(token: str) -> bool:
    # As argparse sees it: a negative number or anything with a space in it is a value.
    return len(token) > 1 and token[0] == "-" and " " not in token and not re.fullmatch(r"-\.?\d.*", token)


def _split_flag(token: str) -> tuple[str, str | None]:
    """`--a_b.c=1` -> (`--a-b.c`, `1`), `-tp=2` -> (`--tensor-parallel-size`, `2`), `-O3` likewise."""
    flag, equals, value = token.partition("=")
    if re.fullmatch(r"-O\d", flag):
        return SHORT_FLAGS["-O"], flag[2:]
    if flag.startswith("--"):
        flag = flag.replace("_", "-")
    else:
        name, dot, key = flag.partition(".")
        flag = SHORT_FLAGS.get(name, name) + dot + key
    return ("--help" if flag == "--help" else flag), (value if equals and flag != "--help" else None)


def _ignored_kind(flag: str) -> str | None:
    name = flag.removeprefix("--").partition(".")[
        0
    ]  # `--compilation-config.mode 3` sets one key of a JSON flag
    if name in IGNORED_LISTS:
        return "list"
    if name in IGNORED_VALUE_FLAGS or name in PARALLEL_FLAGS:
        return "value"
    return "switch" if name.removeprefix("no-") in IGNORED_SWITCHES else None


def _ignored_warning(flag: str) -> str:
    return f"{flag} {IGNORED_BECAUSE.get(flag.removeprefix('--'), 'is a vLLM flag that has no effect here')}"


def _check_ignored(flag: str, values: Sequence[str]) -> None:
    """Refuse what vLLM refuses too, or what asks for several GPUs, though the flag is ignored."""
    if flag.removeprefix("--") in PARALLEL_FLAGS and values[0].strip() != "1":
        raise UsageError(f"{flag} must be 1 (one model runs on one device here), got {values[0]}")
    if flag == "--gpu-memory-utilization":
        try:
            share = float(values[0])
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:  # false for nan, too
            raise UsageError(f"{flag} must be a number above 0 and at most 1, got {values[0]}")


def _unknown_flag(flag: str, own: Mapping[str, str]) -> str:
    known = [*own, *(f"--{name}" for name in (*IGNORED_VALUE_FLAGS, *IGNORED_SWITCHES, *PARALLEL_FLAGS))]
    # Own flags first: of two equally near names the one that does something helps more.
    near = difflib.get_close_matches(flag, list(own), 1, 0.75) or difflib.get_close_matches(
        flag, known, 1, 0.75
    )
    return f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else "")
