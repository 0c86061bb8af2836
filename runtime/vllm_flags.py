"""Lists the flags of `vllm serve` 0.33 that have no option here: those that only tune, and those to refuse.

Each is spelled as in vLLM's parser, without dashes in front; `scripts/compare_flags.py` compares the list
with an installed vLLM. A switch is also `no-x`, and `enable-x` and `disable-x` are two sides of one. Flags of
older versions that scripts still use are among them.
"""

from __future__ import annotations

from typing import NamedTuple

# What follows tunes memory, speed, logging or a kind of model that is not served here: no answer of a dense
# text model depends on it. It is ignored with one line. First the flags with one value, ...
TUNING_VALUES = """
    additional-config all2all-backend allowed-local-media-path anthropic-disabled-thinking-effort
    attention-config aux-output-config code-revision cohere-format compilation-config
    cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb custom-histogram-buckets
    data-parallel-address data-parallel-backend data-parallel-rank data-parallel-rpc-port
    data-parallel-start-rank data-parallel-supervisor-port dbo-decode-token-threshold
    dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size distributed-executor-backend
    distributed-timeout-seconds download-dir dp-supervisor-probe-failure-threshold
    dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config
    elastic-ep-max-dp-size engram-config eplb-config expert-placement-strategy fault-tolerance-config
    gdn-prefill-backend guided-decoding-backend h11-max-header-count h11-max-incomplete-event-size
    ir-op-priority jit-monitor-mode kda-decode-backend kda-prefill-backend kernel-config
    kv-cache-metrics-sample kv-offloading-backend kv-offloading-size limit-mm-per-prompt linear-backend
    log-config-file logging-config lora-dtype mamba-backend mamba-block-size mamba-cache-dtype
    mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr
    master-port max-cpu-loras max-cudagraph-capture-size max-log-len max-lora-cls-labels max-lora-rank
    max-loras max-num-active-seqs max-num-scheduled-tokens max-parallel-loading-workers
    max-seq-len-to-capture media-io-kwargs mm-encoder-attn-backend mm-encoder-attn-dtype
    mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path
    mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb
    mm-processor-cache-type mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb
    mm-tensor-ipc model-impl model-loader-extra-config moe-backend node-rank num-scheduler-steps
    offload-backend offload-group-size offload-num-in-group offload-prefetch-step optimization-level
    otlp-traces-endpoint per-request-spec-decode-metrics performance-mode preemption-mode
    prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit
    pt-load-map-location renderer-num-workers replayssm-buffer-len revision
    safetensors-load-strategy safetensors-prefetch-block-size safetensors-prefetch-num-threads
    show-hidden-metrics-for-version sleep-mode-backend sparse-indexer-topk-backend
    structured-outputs-config swap-space tokenizer-revision ubatch-size video-pruning-method
    video-pruning-rate watchdog-config watermark
""".split()
# ... then switches, ...
TUNING_SWITCHES = """
    aggregate-engine-logging allow-deprecated-quantization calculate-kv-scales cohere-is-reasoning-model
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb
    data-parallel-multi-port-external-lb dcp-q-replicate disable-cascade-attn disable-chunked-mm-input
    disable-custom-all-reduce disable-frontend-multiprocessing disable-hybrid-kv-cache-manager
    disable-nccl-for-dp-synchronization enable-batch-sharded-sampling enable-cumem-allocator enable-dbo
    enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
    enable-flash-late-interaction enable-flashinfer-autotune enable-hc-sp enable-layerwise-nvtx-tracing
    enable-log-deltas enable-log-outputs enable-logging-iteration-details
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend
    enable-offline-docs enable-shm-tensor-arena enable-tower-connector-lora fully-sharded-loras
    interleave-mm-strings jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill language-model-only
    log-error-stack long-prefill-token-threshold-adaptive mm-device-do-normalize mm-encoder-only
    monokernel numa-bind ray-workers-use-nsight scheduler-reserve-full-isl skip-mm-profiling
    sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay trust-remote-code
    trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load use-v2-block-manager
    worker-use-ray
""".split()
# ... then those after which vLLM reads several values, ...
TUNING_LISTS = """
    allowed-media-domains collect-detailed-traces cpu-offload-params cudagraph-capture-sizes
    ignore-patterns kv-cache-dtype-skip-layers lora-target-modules numa-bind-cpus numa-bind-nodes
    offload-params sleep-preserve-parameter-names
""".split()
# ... and one that may have a value.
TUNING_OPTIONAL = ["hf-token"]
# Why a flag is ignored, where "has no effect here" would leave a doubt.
IGNORED_BECAUSE = {
    "code-revision": "code that comes with a model is never run",
    "enable-log-outputs": "answers are never logged",
    "enable-offline-docs": "/docs loads nothing from elsewhere anyway",
    "h11-max-header-count": "a request may have 128 headers",
    "h11-max-incomplete-event-size": "the head of a request may have 64 KiB",
    "max-log-len": "prompts are never logged",
    "revision": "models are never downloaded, a path is what it is",
    "tokenizer-revision": "models are never downloaded, a path is what it is",
    "trust-remote-code": "code that comes with a model is never run",
}


class Refused(NamedTuple):
    """A flag that would change what is served: with any value but a neutral one the server does not start.

    `changes` completes "it would ...". `neutral` are values that ask for nothing, beside `ASKS_FOR_NOTHING`.
    A flag that is refused `always` is not covered by `--ignore-unsupported-flags`.
    """

    kind: str
    changes: str
    neutral: tuple[str, ...] = ()
    always: bool = False


ASKS_FOR_NOTHING = ("", "none", "null", "{}", "[]")
DEVICES = Refused("value", "spread one model over several devices, and here it runs on one", ("1",))
TOOLS = "let the model call tools"
REASONING = "separate the model's reasoning from its answer"
LORA = "serve LoRA adapters"
DRAFTS = "decode speculatively"
OWN_CODE = "run code of yours in the server"
POOLING = "serve embeddings, classes or scores instead of texts"
OTHER_SERVER = "exchange KV cache blocks with another server"
# A key of a JSON flag follows a dot.
REFUSED = {
    "api-server-count": Refused("value", "answer from several API processes, and here one does", ("1",)),
    "data-parallel-size": DEVICES,
    "data-parallel-size-local": DEVICES,
    "decode-context-parallel-size": DEVICES,
    "nnodes": DEVICES,
    "pipeline-parallel-size": DEVICES,
    "prefill-context-parallel-size": DEVICES,
    "tensor-parallel-size": DEVICES,
    "device-ids": Refused("value", "choose the GPU, as CUDA_VISIBLE_DEVICES does", ("0",)),
    "quantization": Refused("value", "quantise the weights, or read quantised ones", ("gguf",)),
    "quantization-config": Refused("value", "quantise the weights"),
    "kv-cache-dtype": Refused("value", "store keys and values in another type than the model's", ("auto",)),
    "disable-sliding-window": Refused("switch", "end the context of a model with a window at that window"),
    "config-format": Refused("value", "read the model's configuration in another format", ("auto", "hf")),
    "hf-config-path": Refused("value", "take the model's configuration from elsewhere"),
    "tokenizer-mode": Refused("value", "tokenize by other rules", ("auto", "hf", "slow", "fast")),
    "model-class-overrides": Refused("value", OWN_CODE),
    "io-processor-plugin": Refused("value", OWN_CODE),
    "logits-processors": Refused("list", OWN_CODE),
    "scheduler-cls": Refused("value", OWN_CODE),
    "worker-cls": Refused("value", OWN_CODE, ("auto",)),
    "worker-extension-cls": Refused("value", OWN_CODE),
    # Authentication may be one: without it the server would be open.
    "middleware": Refused("value", "put code of yours, such as authentication, in front", always=True),
    "speculative-config": Refused("value", DRAFTS),
    "speculative-model": Refused("value", DRAFTS),
    "spec-method": Refused("value", DRAFTS),
    "spec-model": Refused("value", DRAFTS),
    "spec-tokens": Refused("value", DRAFTS, ("0",)),
    "enable-auto-tool-choice": Refused("switch", TOOLS),
    "tool-call-parser": Refused("value", TOOLS),
    "tool-parser-plugin": Refused("value", TOOLS),
    "tool-server": Refused("value", TOOLS),
    "tool-strict-level": Refused("value", TOOLS),
    "enable-reasoning": Refused("switch", REASONING),
    "reasoning-config": Refused("value", REASONING),
    "reasoning-parser": Refused("value", REASONING),
    "reasoning-parser-plugin": Refused("value", REASONING),
    "structured-outputs-config.reasoning_parser": Refused("value", REASONING),
    "structured-outputs-config.reasoning_parser_plugin": Refused("value", REASONING),
    "default-mm-loras": Refused("value", LORA),
    "enable-lora": Refused("switch", LORA),
    "lora-modules": Refused("list", LORA),
    "convert": Refused("value", POOLING, ("auto", "none")),
    "pooler-config": Refused("value", POOLING),
    "runner": Refused("value", POOLING, ("auto", "generate")),
    "task": Refused("value", POOLING, ("auto", "generate")),
    "enable-prompt-embeds": Refused("switch", "take prompts that are embeddings"),
    "enable-return-routed-experts": Refused("switch", "return the experts that a token went to"),
    "aux-output-config.enable_return_routed_experts": Refused(
        "value", "return the experts that a token went to", ("false",)
    ),
    "enable-trace-replay": Refused("switch", "let requests name the tokens that they get"),
    "return-sampling-mask": Refused("switch", "return which tokens could be drawn"),
    "trust-request-chat-template": Refused("switch", "take chat templates from requests"),
    "diffusion-config": Refused("value", "generate by denoising"),
    "watermark-config": Refused("value", "put a watermark into the text"),
    "skip-tokenizer-init": Refused("switch", "take and give token ids without their texts"),
    "tokens-only": Refused("switch", "take and give token ids without their texts"),
    "enable-scale-out": Refused("switch", "serve the endpoints of a split server"),
    "enable-sleep-mode": Refused("switch", "let a client put the model to sleep"),
    "grpc": Refused("switch", "serve gRPC instead of HTTP"),
    "grpc-port": Refused("value", "serve gRPC beside HTTP"),
    "headless": Refused("switch", "start without an HTTP server"),
    "ec-transfer-config": Refused("value", OTHER_SERVER),
    "kv-transfer-config": Refused("value", OTHER_SERVER),
    "kv-events-config": Refused("value", "publish what the KV cache stores and evicts"),
    "weight-transfer-config": Refused("value", "take new weights while it runs"),
}
# A flag that means nothing without another: vLLM does not start then, whatever else is ignored.
NEEDS = {"enable-auto-tool-choice": "tool-call-parser", "enable-log-outputs": "enable-log-requests"}

KINDS = {
    **dict.fromkeys(TUNING_VALUES, "value"),
    **dict.fromkeys(TUNING_SWITCHES, "switch"),
    **dict.fromkeys(TUNING_LISTS, "list"),
    **dict.fromkeys(TUNING_OPTIONAL, "optional"),
    **{name: flag.kind for name, flag in REFUSED.items() if "." not in name},
}

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
