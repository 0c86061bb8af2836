"""Lists the flags of `vllm serve` 0.33 that this server does not have, and vLLM's short spellings."""

from __future__ import annotations

# Flags of `vllm serve` that are known here but do nothing. With one of them a script written for vLLM
# still starts; a warning line says what it does not get.
IGNORED_VALUE_FLAGS = """
    additional-config all2all-backend allowed-local-media-path anthropic-disabled-thinking-effort
    api-server-count attention-config aux-output-config code-revision
    cohere-format compilation-config config-format convert cp-kv-cache-interleave-size
    cpu-distributed-timeout-seconds cpu-offload-gb custom-histogram-buckets data-parallel-address
    data-parallel-backend data-parallel-rank data-parallel-rpc-port data-parallel-start-rank
    data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend
    dcp-kv-cache-interleave-size default-mm-loras device-ids diffusion-config distributed-executor-backend
    distributed-timeout-seconds download-dir dp-supervisor-probe-failure-threshold
    dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config
    ec-transfer-config elastic-ep-max-dp-size engram-config eplb-config expert-placement-strategy
    fault-tolerance-config gdn-prefill-backend grpc-port guided-decoding-backend h11-max-header-count
    h11-max-incomplete-event-size hf-config-path hf-overrides io-processor-plugin ir-op-priority
    jit-monitor-mode kda-decode-backend kda-prefill-backend kernel-config kv-cache-dtype
    kv-cache-metrics-sample kv-events-config kv-offloading-backend kv-offloading-size kv-transfer-config
    limit-mm-per-prompt linear-backend log-config-file log-level logging-config lora-dtype mamba-backend
    mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype
    mamba-ssu-algorithm master-addr master-port max-cpu-loras max-cudagraph-capture-size max-log-len
    max-lora-cls-labels max-lora-rank max-loras max-num-active-seqs max-num-queued-tokens
    max-num-scheduled-tokens max-parallel-loading-workers max-seq-len-to-capture media-io-kwargs
    middleware mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path
    mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-hasher-algorithm
    mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type mm-processor-device
    mm-processor-kwargs mm-shm-cache-max-object-size-mb mm-tensor-ipc model-class-overrides model-impl
    model-loader-extra-config moe-backend node-rank num-scheduler-steps offload-backend offload-group-size
    offload-num-in-group offload-prefetch-step optimization-level otlp-traces-endpoint
    per-request-spec-decode-metrics performance-mode pooler-config preemption-mode
    prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit
    profiler-config pt-load-map-location quantization quantization-config reasoning-config
    reasoning-parser reasoning-parser-plugin renderer-num-workers replayssm-buffer-len revision
    rope-scaling runner safetensors-load-strategy safetensors-prefetch-block-size
    safetensors-prefetch-num-threads scheduler-cls show-hidden-metrics-for-version
    sparse-indexer-topk-backend spec-method spec-model spec-tokens speculative-config speculative-model
    structured-outputs-config swap-space task tokenizer-mode tokenizer-revision tool-call-parser
    tool-parser-plugin tool-server tool-strict-level ubatch-size video-pruning-method video-pruning-rate
    watermark watermark-config weight-transfer-config worker-cls worker-extension-cls
""".split()
# These are switches; each may have `no-` in front.
IGNORED_SWITCHES = """
    aggregate-engine-logging allow-deprecated-quantization calculate-kv-scales cohere-is-reasoning-model
    cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb
    data-parallel-multi-port-external-lb dcp-q-replicate disable-cascade-attn disable-chunked-mm-input
    disable-custom-all-reduce disable-frontend-multiprocessing disable-hybrid-kv-cache-manager
    disable-log-requests disable-nccl-for-dp-synchronization disable-sliding-window
    enable-auto-tool-choice enable-batch-sharded-sampling enable-cumem-allocator enable-dbo
    enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
    enable-flash-late-interaction enable-flashinfer-autotune enable-hc-sp enable-layerwise-nvtx-tracing
    enable-log-deltas enable-log-outputs enable-logging-iteration-details enable-lora
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint enable-mfu-metrics
    enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras enable-nccl-comm-suspend
    enable-offline-docs enable-prompt-embeds enable-reasoning enable-return-routed-experts
    enable-scale-out enable-shm-tensor-arena enable-sleep-mode enable-tower-connector-lora
    enable-trace-replay exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras
    grpc headless interleave-mm-strings jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill
    language-model-only log-error-stack long-prefill-token-threshold-adaptive mm-device-do-normalize
    mm-encoder-only numa-bind ray-workers-use-nsight return-sampling-mask scheduler-reserve-full-isl
    skip-mm-profiling skip-tokenizer-init sleep-mode-offload-cudagraph specialize-active-lora
    swa-bounded-replay tokens-only trust-remote-code trust-request-chat-template trust-request-mm-kwargs
    use-fp64-gumbel use-replayssm use-tqdm-on-load use-v2-block-manager worker-use-ray
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
    "trust-remote-code": "is ignored: code that comes with a model is never run",
    "revision": "is ignored: models are never downloaded, a path is what it is",
}
