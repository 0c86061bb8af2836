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
    additional-config all2all-backend allowed-headers allowed-local-media-path allowed-methods
    allowed-origins anthropic-disabled-thinking-effort api-server-count attention-config
    aux-output-config chat-template-content-format code-revision cohere-format compilation-config config
    config-format convert cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb
    custom-histogram-buckets data-parallel-address data-parallel-backend data-parallel-rank
    data-parallel-rpc-port data-parallel-start-rank data-parallel-supervisor-port
    dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size
    default-chat-template-kwargs default-mm-loras device device-ids diffusion-config
    disable-access-log-for-endpoints distributed-executor-backend distributed-timeout-seconds
    download-dir dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
    dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config ec-transfer-config
    elastic-ep-max-dp-size engram-config eplb-config expert-placement-strategy fault-tolerance-config
    fingerprint-mode fingerprint-value gdn-prefill-backend gpu-memory-utilization grpc-port
    guided-decoding-backend h11-max-header-count h11-max-incomplete-event-size hf-config-path
    hf-overrides io-processor-plugin ir-op-priority jit-monitor-mode kda-decode-backend
    kda-prefill-backend kernel-config kv-cache-dtype kv-cache-metrics-sample kv-events-config
    kv-offloading-backend kv-offloading-size kv-transfer-config limit-mm-per-prompt linear-backend
    log-config-file log-level logging-config logprobs-mode lora-dtype mamba-backend mamba-block-size
    mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype
    mamba-ssu-algorithm master-addr master-port max-cpu-loras max-cudagraph-capture-size max-log-len
    max-logprobs max-lora-cls-labels max-lora-rank max-loras max-num-active-seqs max-num-queued-tokens
    max-num-scheduled-tokens max-parallel-loading-workers max-seq-len-to-capture media-io-kwargs
    middleware mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path
    mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-tp-mode
    mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type
    mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb mm-tensor-ipc
    model-class-overrides model-impl model-loader-extra-config moe-backend node-rank num-scheduler-steps
    offload-backend offload-group-size offload-num-in-group offload-prefetch-step optimization-level
    otlp-traces-endpoint override-generation-config per-request-spec-decode-metrics performance-mode
    pooler-config preemption-mode prefill-schedule-interval prefix-cache-retention-interval
    prefix-caching-hash-algo prefix-match-unit profiler-config pt-load-map-location quantization
    quantization-config reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers
    replayssm-buffer-len revision root-path rope-scaling runner safetensors-load-strategy
    safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls
    show-hidden-metrics-for-version sparse-indexer-topk-backend spec-method spec-model spec-tokens
    speculative-config speculative-model sse-keep-alive-interval stream-interval
    structured-outputs-config swap-space task tokenizer-mode tokenizer-revision tool-call-parser
    tool-parser-plugin tool-server tool-strict-level ubatch-size video-pruning-method video-pruning-rate
    watermark watermark-config weight-transfer-config worker-cls worker-extension-cls
""".split()
# These are switches; each may have `no-` in front.
IGNORED_SWITCHES = """
    aggregate-engine-logging allow-credentials allow-deprecated-quantization calculate-kv-scales
    cohere-is-reasoning-model cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb
    data-parallel-multi-port-external-lb dcp-q-replicate disable-cascade-attn disable-chunked-mm-input
    disable-custom-all-reduce disable-fastapi-docs disable-frontend-multiprocessing
    disable-hybrid-kv-cache-manager disable-log-requests disable-nccl-for-dp-synchronization
    disable-sliding-window enable-auto-tool-choice enable-batch-sharded-sampling enable-cumem-allocator
    enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel
    enable-fault-tolerance enable-flash-late-interaction enable-flashinfer-autotune enable-hc-sp
    enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
    enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding
    enable-mamba-shared-prefix-checkpoint enable-mfu-metrics enable-mixed-moe-lora-format
    enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend enable-offline-docs
    enable-per-request-metrics enable-prompt-embeds enable-reasoning enable-request-id-headers
    enable-return-routed-experts enable-scale-out enable-server-load-tracking enable-shm-tensor-arena
    enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint enable-tower-connector-lora
    enable-trace-replay
    enforce-eager exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras
    grpc headless interleave-mm-strings jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill
    language-model-only log-error-stack long-prefill-token-threshold-adaptive mm-device-do-normalize
    mm-encoder-only numa-bind ray-workers-use-nsight return-sampling-mask return-tokens-as-token-ids
    scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init sleep-mode-offload-cudagraph
    specialize-active-lora swa-bounded-replay tokens-only trust-remote-code trust-request-chat-template
    trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load use-v2-block-manager
    worker-use-ray
""".split()
# vLLM reads several values after each of these.
IGNORED_LISTS = """
    allowed-media-domains collect-detailed-traces cpu-offload-params cudagraph-capture-sizes
    ignore-patterns kv-cache-dtype-skip-layers logits-processors lora-modules lora-target-modules
    numa-bind-cpus numa-bind-nodes offload-params sleep-preserve-parameter-names
""".split()
# Refused unless 1: a user who asks for two GPUs must not be served by less without noticing.
PARALLEL_FLAGS = """
    data-parallel-size data-parallel-size-local decode-context-parallel-size nnodes
    pipeline-parallel-size prefill-context-parallel-size tensor-parallel-size
""".split()
# Refused: a user who asks for encryption must not be served without it.
TLS_FLAGS = ("ssl-ca-certs", "ssl-cert-reqs", "ssl-certfile", "ssl-ciphers", "ssl-keyfile")
OTHER_SPELLINGS = {
    "-ac": "--attention-config",
    "-asc": "--api-server-count",
    "-cc": "--compilation-config",
    "-dc": "--diffusion-config",
    "-dcp": "--decode-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpa": "--data-parallel-address",
    "-dpb": "--data-parallel-backend",
    "-dpe": "--data-parallel-external-lb",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpl": "--data-parallel-size-local",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-dpn": "--data-parallel-rank",
    "-dpp": "--data-parallel-rpc-port",
    "-dpr": "--data-parallel-start-rank",
    "-ep": "--enable-expert-parallel",
    "-n": "--nnodes",
    "-pcp": "--prefill-context-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-r": "--node-rank",
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
    "-O": "--optimization-level",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
IGNORED_BECAUSE = {
    "gpu-memory-utilization": "has no effect on a CPU; --kv-cache-memory-bytes sets the size of the KV cache",
    "enforce-eager": "has no effect on a CPU: there are no CUDA graphs, every step is eager",
    "trust-remote-code": "is ignored: code that comes with a model is never run",
    "config": "is ignored: options are read from the command line only",
    "revision": "is ignored: models are never downloaded, a path is what it is",
}


class UsageError(ConfigError):
    """A flag is unknown, lacks its value or has a wrong one."""


def normalise_argv(argv: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    """Bring vLLM's spellings of flags into the one form that Typer reads.

    `own` maps each flag of the command to its kind: "value", "list" (several values) or "switch". In
    the result underscores in flag names are dashes, each value is joined to its long flag with "=", a list
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
        flag, value = _split_flag(token, own)
        kind = own.get(flag) or _ignored_kind(flag)
        if kind is None:
            raise UsageError(_unknown_flag(flag, own))
        if flag.removeprefix("--") in TLS_FLAGS:
            raise UsageError(f"{flag}: connections cannot be encrypted here, put a TLS proxy in front")
        if kind == "switch" and value is not None:
            raise UsageError(f"{flag} takes no value, got {value!r}")
        values = [] if value is None else [value]
        if kind != "switch" and not values:
            if rest and not _is_flag(rest[0]):
                values.append(rest.pop(0))
            elif kind != "optional":
                raise UsageError(f"{flag} needs a value")
        while kind == "list" and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        if flag in own:
            for each in values:
                # A short flag is followed by its value: with "=" that would become part of the value.
                out += [f"{flag}={each}"] if flag.startswith("--") else [flag, each]
            if not values:
                out.append(flag)
        else:
            _check_ignored(flag, values)
            if flag.removeprefix("--") not in PARALLEL_FLAGS:
                warn(_ignored_warning(flag))
    return out


def _is_flag(token: str) -> bool:
    # As argparse sees it: a negative number or anything with a space in it is a value.
    return len(token) > 1 and token[0] == "-" and " " not in token and not re.fullmatch(r"-\.?\d.*", token)


def _split_flag(token: str, own: Mapping[str, str]) -> tuple[str, str | None]:
    """`--a_b.c=1` -> (`--a-b.c`, `1`), `-tp=2` -> (`--tensor-parallel-size`, `2`), `-O3` likewise.

    A short flag of the command's own is not taken for vLLM's abbreviation of another.
    """
    flag, equals, value = token.partition("=")
    if re.fullmatch(r"-O\d", flag):
        return OTHER_SPELLINGS["-O"], flag[2:]
    name, dot, key = flag.partition(".")
    if name.startswith("--"):
        name, key = name.replace("_", "-"), key.replace("_", "-")
    flag = (name if name in own else OTHER_SPELLINGS.get(name, name)) + dot + key
    return ("--help" if flag == "--help" else flag), (value if equals and flag != "--help" else None)


def _ignored_kind(flag: str) -> str | None:
    # `--compilation-config.mode 3` sets one key of a JSON flag.
    name = flag.removeprefix("--").partition(".")[0]
    if name in IGNORED_LISTS:
        return "list"
    if name in IGNORED_VALUE_FLAGS or name in PARALLEL_FLAGS or name in TLS_FLAGS:
        return "value"
    if name == "hf-token":
        return "optional"
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
    names = (*IGNORED_VALUE_FLAGS, *IGNORED_SWITCHES, *IGNORED_LISTS, *PARALLEL_FLAGS)
    known = [*own, *(f"--{name}" for name in names)]
    # Own flags first: of two equally near names the one that does something helps more.
    near = difflib.get_close_matches(flag, list(own), 1, 0.75) or difflib.get_close_matches(
        flag, known, 1, 0.75
    )
    return f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else "")
