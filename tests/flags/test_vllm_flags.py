"""Every flag of vLLM's own parser: honoured, ignored with one line, or a start that ends with one line.

The lists are what `scripts/compare_flags.py --list` printed of vLLM 0.33.0.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_case import command_param, error_line, get_command, own_flags

from microvllm import cli
from microvllm.openai_compat.flags.argv import UsageError, normalise_argv
from microvllm.runtime.options import vllm_flags

# Flags with one value, ...
VALUES = """
    additional-config all2all-backend allowed-headers allowed-local-media-path allowed-methods
    allowed-origins anthropic-disabled-thinking-effort api-server-count attention-backend attention-config
    aux-output-config block-size chat-template chat-template-content-format code-revision cohere-format
    compilation-config config config-format convert cp-kv-cache-interleave-size
    cpu-distributed-timeout-seconds cpu-offload-gb custom-histogram-buckets data-parallel-address
    data-parallel-backend data-parallel-rank data-parallel-rpc-port data-parallel-size
    data-parallel-size-local data-parallel-start-rank data-parallel-supervisor-port
    dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size
    decode-context-parallel-size default-chat-template-kwargs default-mm-loras device-ids
    device-memory-utilization diffusion-config disable-access-log-for-endpoints
    distributed-executor-backend distributed-timeout-seconds download-dir
    dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s
    dp-sync-interval dtype ec-manager-config ec-transfer-config elastic-ep-max-dp-size engram-config
    eplb-config expert-placement-strategy fault-tolerance-config fingerprint-mode fingerprint-value
    gdn-prefill-backend generation-config gpu-memory-utilization grpc-port h11-max-header-count
    h11-max-incomplete-event-size hf-config-path hf-overrides host io-processor-plugin ir-op-priority
    jit-monitor-mode kda-decode-backend kda-prefill-backend kernel-config kv-cache-dtype
    kv-cache-memory-bytes kv-cache-metrics-sample kv-events-config kv-offloading-backend
    kv-offloading-size kv-transfer-config limit-mm-per-prompt linear-backend load-format log-config-file
    log-level logging-config logprobs-mode long-prefill-token-threshold lora-dtype mamba-backend
    mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype
    mamba-ssu-algorithm master-addr master-port max-cpu-loras max-cudagraph-capture-size max-log-len
    max-logprobs max-lora-cls-labels max-lora-rank max-loras max-model-len max-num-active-seqs
    max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens max-num-scheduled-tokens max-num-seqs
    max-parallel-loading-workers media-io-kwargs middleware mm-encoder-attn-backend mm-encoder-attn-dtype
    mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path
    mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb
    mm-processor-cache-type mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb
    mm-tensor-ipc model model-class-overrides model-impl model-loader-extra-config moe-backend nnodes
    node-rank num-gpu-blocks-override offload-backend offload-group-size offload-num-in-group
    offload-prefetch-step optimization-level otlp-traces-endpoint override-generation-config
    per-request-spec-decode-metrics performance-mode pipeline-parallel-size pooler-config port
    prefill-context-parallel-size prefill-schedule-interval prefix-cache-retention-interval
    prefix-caching-hash-algo prefix-match-unit profiler-config pt-load-map-location quantization
    quantization-config reasoning-config reasoning-effort-map reasoning-parser reasoning-parser-plugin
    renderer-num-workers replayssm-buffer-len response-role revision root-path runner
    safetensors-load-strategy safetensors-prefetch-block-size safetensors-prefetch-num-threads
    scheduler-cls scheduling-policy seed show-hidden-metrics-for-version shutdown-timeout
    sleep-mode-backend sparse-indexer-topk-backend spec-method spec-model spec-tokens speculative-config
    sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile
    stream-interval structured-outputs-config tensor-parallel-size tokenizer tokenizer-mode
    tokenizer-revision tool-call-parser tool-parser-plugin tool-server tool-strict-level ubatch-size uds
    uvicorn-log-level video-pruning-method video-pruning-rate watchdog-config watermark watermark-config
    weight-transfer-config worker-cls worker-extension-cls
""".split()
# ... or none, ...
OPTIONAL = """
    hf-token
""".split()
# ... or several.
LISTS = """
    allowed-media-domains api-key collect-detailed-traces cpu-offload-params cudagraph-capture-sizes
    ignore-patterns kv-cache-dtype-skip-layers logits-processors lora-modules lora-target-modules
    numa-bind-cpus numa-bind-nodes offload-params served-model-name sleep-preserve-parameter-names
""".split()
# Switches without a second form, ...
SWITCHES = """
    aggregate-engine-logging data-parallel-multi-port-external-lb disable-log-stats grpc headless
""".split()
# ... and with one: `--no-x`, and of `--enable-x` also `--disable-x`.
PAIRS = """
    allow-credentials allow-deprecated-quantization async-scheduling cohere-is-reasoning-model
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb dcp-q-replicate
    disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce disable-fastapi-docs
    disable-hybrid-kv-cache-manager disable-nccl-for-dp-synchronization disable-sliding-window
    disable-uvicorn-access-log enable-auto-tool-choice enable-batch-sharded-sampling
    enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep enable-ep-weight-filter
    enable-eplb enable-expert-parallel enable-fault-tolerance enable-flash-late-interaction
    enable-flashinfer-autotune enable-force-include-usage enable-hc-sp enable-layerwise-nvtx-tracing
    enable-log-deltas enable-log-outputs enable-log-requests enable-logging-iteration-details enable-lora
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend
    enable-offline-docs enable-per-request-metrics enable-prefix-caching enable-prompt-embeds
    enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts enable-scale-out
    enable-server-load-tracking enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh
    enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay enforce-eager
    exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras
    interleave-mm-strings jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill language-model-only
    log-error-stack long-prefill-token-threshold-adaptive mm-device-do-normalize mm-encoder-only
    monokernel numa-bind ray-workers-use-nsight return-sampling-mask return-tokens-as-token-ids
    scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init sleep-mode-offload-cudagraph
    specialize-active-lora swa-bounded-replay tokens-only trust-remote-code trust-request-chat-template
    trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load
""".split()

TUNING = {name: kind for name, kind in vllm_flags.KINDS.items() if name not in vllm_flags.REFUSED}
NAMES = [*VALUES, *OPTIONAL, *LISTS, *SWITCHES, *PAIRS]
ALIASES = {"device-memory-utilization": "gpu-memory-utilization"}
# Objects of these without a key change nothing in vLLM.
NOTHING_WITHOUT_KEYS = {
    *("kv-transfer-config", "ec-transfer-config", "reasoning-config"),
    *("default-mm-loras", "model-class-overrides"),
}
OLD = "swap-space num-scheduler-steps guided-decoding-backend max-seq-len-to-capture preemption-mode".split()
OLD_SWITCHES = "use-v2-block-manager worker-use-ray disable-frontend-multiprocessing".split()


def values_of(name: str) -> list[str]:
    """Words after a flag that ask for something."""
    if name in (*SWITCHES, *PAIRS, *OLD_SWITCHES, *OPTIONAL):
        return []
    return ["7", "8"] if name in LISTS else ["7"]


def read(*argv: str) -> tuple[list[str], list[str]]:
    """The words that Typer gets of a command line for `serve`, and the warnings."""
    lines: list[str] = []
    own = get_command(cli.app).commands["serve"].flag_kinds()  # type: ignore[attr-defined]
    return normalise_argv(argv, own, lines.append), lines


def refusal(*argv: str) -> str:
    """The one line that says what is wrong, and the remedy behind it if the error has its own."""
    with pytest.raises(UsageError) as caught:
        read(*argv)
    line = " ".join([str(caught.value), *filter(None, [caught.value.remedy])])
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_vllm_is_known_once(name: str) -> None:
    """As an option that takes as many words as vLLM's, or in one of the two lists."""
    flag = f"--{ALIASES.get(name, name)}"
    if flag in own_flags():
        assert name not in vllm_flags.KINDS
        assert command_param(flag).is_flag is not bool(values_of(name))
        return
    kind = "list" if name in LISTS else "optional" if name in OPTIONAL else "value"
    assert vllm_flags.KINDS[name] == ("switch" if name in (*SWITCHES, *PAIRS) else kind)


@pytest.mark.parametrize("name", [*(each for each in NAMES if each in vllm_flags.KINDS), *OLD, *OLD_SWITCHES])
def test_a_flag_without_an_option_warns_or_ends_the_start(name: str) -> None:
    argv = ["the-model", f"--{name}", *values_of(name), "--port", "8123"]
    refused = vllm_flags.REFUSED.get(name)
    needed = [f"--{vllm_flags.NEEDS[name]}"] if name in vllm_flags.NEEDS else []
    if needed:
        assert f"--{name} needs {needed[0]}" in refusal(*argv, "--ignore-unsupported-flags")
        argv += [*needed, *values_of(vllm_flags.NEEDS[name])] if refused else needed
    if refused is not None:
        line = refusal(*argv)
        assert f"--{name}" in line and f"it would {refused.changes}" in line
        assert line.count("--ignore-unsupported-flags") == (not refused.always)
        argv.append("--ignore-unsupported-flags")
        if refused.always:
            assert f"--{name}" in refusal(*argv)
            return
    words, lines = read(*argv)
    assert words[:2] == ["the-model", "--port=8123"] and f"--{name}" not in " ".join(words)
    assert len([line for line in lines if line.startswith(f"--{name} ")]) == 1
    assert len(lines) == 1 + len(needed) * (refused is not None)


@pytest.mark.parametrize("name", vllm_flags.REFUSED)
def test_a_refused_flag_that_asks_for_nothing_is_let_through(name: str) -> None:
    refused = vllm_flags.REFUSED[name]
    base = name.partition(".")[0]
    if refused.kind == "switch":
        argvs = [[f"--no-{name}"]]
        if name.startswith("enable-"):
            argvs.append([f"--disable-{name.removeprefix('enable-')}"])
    else:
        values = (*vllm_flags.ASKS_FOR_NOTHING, *refused.neutral)
        argvs = [[f"--{name}={value}"] for value in values] + [[f"--{name}", values[-1].upper()]]
    for argv in argvs:
        words, lines = read("m", *argv)
        assert words == ["m"]
        assert lines == ([f"--{base} has no effect here"] if TUNING.get(base) == "value" else [])


@pytest.mark.parametrize("name", [name for name, each in vllm_flags.REFUSED.items() if each.kind != "switch"])
@pytest.mark.parametrize("empty", ["{}", "[]"])
def test_an_empty_value_is_never_dropped_in_silence(name: str, empty: str) -> None:
    """Where vLLM does nothing with it, the table says so; `--speculative-config {}` does not start vLLM."""
    if empty in vllm_flags.REFUSED[name].neutral:
        assert name in NOTHING_WITHOUT_KEYS
    else:
        assert f"--{name}" in refusal("m", f"--{name}={empty}")


@pytest.mark.parametrize("name", PAIRS)
def test_every_switch_has_both_spellings_of_its_second_form(name: str) -> None:
    flags = [f"--no-{name}"]
    if name.startswith("enable-"):
        flags.append(f"--disable-{name.removeprefix('enable-')}")
    elif name.startswith("disable-"):
        flags.append(f"--enable-{name.removeprefix('disable-')}")
    results = [read("m", flag) for flag in flags]
    assert results == [results[0]] * len(flags)
    words, lines = results[0]
    if f"--{name}" in own_flags():
        assert words == ["m", flags[0]] and not lines
    else:
        assert words == ["m"] and len(lines) == (TUNING.get(name) == "switch")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--disable-prefix-caching", "--no-enable-prefix-caching"),
        ("--no-disable-prefix-caching", "--enable-prefix-caching"),
        ("--enable-uvicorn-access-log", "--no-disable-uvicorn-access-log"),
        ("--disable-log-requests", "--no-enable-log-requests"),
        ("--gpu-memory-util 0.5", "--gpu-memory-utilization=0.5"),
        ("--gpu_memory_u=0.5", "--gpu-memory-utilization=0.5"),
        ("--device-memory 0.5", "--gpu-memory-utilization=0.5"),
        ("--no-enable-prefix", "--no-enable-prefix-caching"),
        ("--disable-prefix", "--no-enable-prefix-caching"),
        ("--served a b", "--served-model-name=a --served-model-name=b"),
        ("--override-gen.top_k 1k", '--override-generation-config={"top_k":1000}'),
        ("--override-gen.a+ x,y --override-gen.a+=z", '--override-generation-config={"a":["x","y","z"]}'),
    ],
)
def test_spellings_that_vllm_knows(argv: str, words: str) -> None:
    got, lines = read("m", *argv.split())
    assert [word.replace(" ", "") for word in got] == ["m", *words.split()] and not lines


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("--max-num 4", "--max-num is ambiguous: it may be --max-num-active-seqs, "),
        ("--enable-l", "--enable-l is ambiguous"),
        ("--gpu-memory-utilisation 0.5", "unknown flag --gpu-memory-utilisation, did you mean --gpu-mem"),
        ("--disable-prefix-caching=1", "takes no value"),
        ("--enable-lora.rank 8", "unknown flag --enable-lora.rank"),
        ("--kv-cache-dtype-skip-layers 0 1", "--kv-cache-dtype-skip-layers 0 1 (it would keep keys and"),
        ("--calculate-kv-scales", "--calculate-kv-scales (it would measure the scales"),
        ("-q awq --kv-transfer-config.a b", "--kv-transfer-config a=b (it would"),
        ("-sc.method ngram", "--speculative-config method=ngram"),
        ("--structured-outputs-config.reasoning_parser qwen3", "_parser qwen3 (it would separate"),
        ('--structured-outputs-config {"reasoning_parser":"qwen3"}', "_parser qwen3 (it would separate"),
        (
            '--structured-outputs-config {"disable_any_whitespace":true}',
            "whitespace true (it would write JSON",
        ),
        ("--aux-output-config.enable_return_routed_experts true", "enable_return_routed_experts true (it"),
        ("--api-server-count 2", "--api-server-count 2 (it would answer from several"),
        ("--enable-lora --ignore-unsupported-flags --no-ignore-unsupported-flags", "--enable-lora"),
    ],
)
def test_one_line_says_what_is_wrong(argv: str, problem: str) -> None:
    assert problem in refusal("m", *argv.split())


def test_the_last_value_counts(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("hf-config-path: here\nenable-lora: true\npipeline-parallel-size: 2", "utf-8")
    assert "--hf-config-path here" in refusal("m", "--config", str(file))
    argv = ["--hf-config-path", "", "--disable-lora", "-pp", "2", "-pp", "1"]
    assert read("m", "--config", str(file), *argv) == (["m"], [])


def test_a_file_may_ignore_unsupported_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("ignore-unsupported-flags: true\nlora-modules: [a=b, c=d]", "utf-8")
    assert read("m", "--config", str(file))[1] == [
        "--lora-modules a=b c=d is ignored: it would serve LoRA adapters"
    ]
    assert "--lora-modules a=b c=d" in refusal("m", "--config", str(file), "--no-ignore-uns")


@pytest.mark.parametrize("argv", ["serve m", "run-batch -i a -o b --model m", "generate hello --model m"])
def test_commands_that_load_a_model_refuse_what_would_change_the_service(
    argv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, *argv.split(), "--middleware", "auth.check", "--ignore-unsupported-flags")
    assert "--middleware auth.check (it would put code of yours, such as authentication, in front)" in line


@pytest.mark.parametrize("flag", ["--swap-space", "-tp", "--enable-lora", "--no-enable-eplb"])
def test_other_commands_have_their_own_flags_alone(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"unknown flag {flag}" in error_line(capsys, "chat", flag, "1")
