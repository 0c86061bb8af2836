"""Declares the engine's options, `EngineArgs`, and resolves them to an `EngineConfig`.

Nothing here imports torch: the API process resolves the configuration, the engine process receives it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from microvllm.adapters.files.quantization import QUANTIZATIONS
from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_events.config import KVEventsConfig, read_kv_events
from microvllm.runtime.kv_memory import KV_BYTES, CacheLayout, fit_states, size_cache, state_rows
from microvllm.runtime.machine import DEVICES, choose_device, default_threads, usable_cores
from microvllm.runtime.options import start_checks, vllm_environment
from microvllm.runtime.options.backends import (
    DEFAULT_BLOCK_SIZES,
    DTYPE_ALIASES,
    choose_backend,
    choose_dtype,
    choose_format,
    choose_kv_dtype,
    compile_kernels,
    why_unpacked,
)
from microvllm.runtime.options.find_model import DEMO_GENERATION_CONFIG, find_model_and_tokenizer, is_demo
from microvllm.runtime.options.flag import (
    ANSWERS,
    AUTO_QUEUE,
    LOGS,
    MACHINE,
    MODEL,
    SCHEDULING,
    check_flags,
    context_length,
    flag,
    human_int,
    optional_text,
    queue_length,
    required_flag,
)
from microvllm.runtime.options.pooler_config import CONVERTS, RUNNERS
from microvllm.runtime.options.quantization import quantize
from microvllm.runtime.options.rank_checks import check_engines, check_ranks
from microvllm.runtime.options.read_spec import read_spec
from microvllm.runtime.progress import OnProgress

logger = logging.getLogger("microvllm.config")

DTYPES = ("float32", "bfloat16", "float16")
SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")  # described in `core/policies.py`
# A benchmark's client sends 10,000 prompts at once; as many requests as there may be connections.
DEFAULT_MAX_NUM_QUEUED_REQS = 1 << 14
DEFAULT_MAX_NUM_QUEUED_TOKENS = 1 << 24
DEFAULT_MAX_NUM_SEQS = 256
GPU_MEMORY_UTILIZATION = 0.92
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(kw_only=True)
class EngineArgs:
    """Engine options under vLLM's names; None means "decide from the model and the machine"."""

    model: str = required_flag(MODEL, "A folder, .gguf file, downloaded hub name, or smollm2-135m-instruct.")
    tokenizer: str | None = flag(None, MODEL, "Folder or .gguf file of the tokenizer, if not the model's.")
    revision: str | None = flag(None, MODEL, "Branch, tag or commit of a model in the Hugging Face cache.")
    tokenizer_revision: str | None = flag(None, MODEL, "The same for its tokenizer.")
    download_dir: str | None = flag(None, MODEL, "Hugging Face cache, if not the usual one.", metavar="DIR")
    runner: str = flag(
        "auto",
        MODEL,
        "generate texts; pooling: vectors (/v1/embeddings, /rerank, /score); auto: as the model's files say.",
        choices=RUNNERS,
    )
    convert: str = flag("auto", MODEL, "embed: the same as --runner pooling; auto or none.", choices=CONVERTS)
    pooler_config: dict[str, Any] | None = flag(
        None, MODEL, "How vectors are made: pooling_type (LAST, MEAN or CLS), use_activation, dimensions."
    )
    dtype: str = flag(
        "auto",
        MODEL,
        "auto, float32 (float), bfloat16, or on a GPU float16 (half).",
        choices=("auto", *DTYPES, *DTYPE_ALIASES),
    )
    load_format: str = flag("auto", MODEL, "auto, safetensors, gguf, or dummy (random weights).")
    quantization: str | None = flag(
        None,
        MODEL,
        "Quantise plain weights on loading: fp8 (fp8_per_tensor), fp8_per_channel or fp8_per_block. Of other "
        "checkpoints the method, which config.json says anyway: another one ends the start.",
        choices=QUANTIZATIONS,
        read=optional_text,
    )
    quantization_config: dict[str, Any] | None = flag(
        None, MODEL, "What of plain weights loading quantises: linear, moe, ignore, or targets by module."
    )
    gguf_weights: str = flag(
        "auto",
        MODEL,
        "How the matrices of a .gguf file are kept: packed, multiplied exactly from its blocks, on a GPU "
        "all types but IQ4; dequantized, rounded to --dtype; auto, packed unless the "
        "backend is torch.",
        choices=("auto", "packed", "dequantized"),
    )
    cpu_activations: str = flag(
        "float32",
        MODEL,
        "What packed weights are multiplied with: float32, exact; int8, activations rounded to 8 bits "
        "in groups of 32: products in integers, faster, not exact.",
        choices=("float32", "int8"),
    )
    batch_invariant: bool | None = flag(
        None,
        MODEL,
        "Give a request the same answer to the last bit whatever runs beside it; by backends cpu and triton.",
    )
    hf_overrides: dict[str, Any] | None = flag(None, MODEL, "Values in place of those in config.json.")
    rope_scaling: dict[str, Any] | None = flag(None, MODEL, "The same as --hf-overrides.rope_scaling.")
    rope_theta: float | None = flag(None, MODEL, "The same as --hf-overrides.rope_theta.")
    max_model_len: int | None = flag(
        None,
        MODEL,
        "Context length; auto or -1: the model's, no longer than what fits into memory.",
        metavar="TOKENS",
        low=1,
        read=context_length,
    )
    seed: int = flag(0, MODEL, "Default seed.", low=-(1 << 63), high=(1 << 63) - 1)

    generation_config: str = flag(
        "auto", ANSWERS, "Sampling defaults: auto (the model's), vllm (none), or a folder."
    )
    override_generation_config: dict[str, Any] | None = flag(
        None, ANSWERS, "Sampling defaults in place of the model's."
    )
    max_logprobs: int = flag(20, ANSWERS, "Log probabilities that a request may ask for; -1: all.", low=-1)
    logprobs_mode: str = flag(
        "raw_logprobs",
        ANSWERS,
        "raw_logprobs, processed_logprobs, raw_logits or processed_logits.",
        choices=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
    )

    block_size: int | None = flag(None, SCHEDULING, "Tokens in a KV block.", low=1)
    kv_cache_dtype: str = flag(
        "auto",
        SCHEDULING,
        "Type of cached keys and values: auto, the model's, or fp8 if its checkpoint says so; fp8 (fp8_e4m3) "
        "of half the bytes, by backends triton and torch.",
    )
    kv_cache_memory_bytes: int | None = flag(
        None, SCHEDULING, "Size of the KV cache, such as 1G.", metavar="BYTES", low=1, read=human_int
    )
    num_gpu_blocks_override: int | None = flag(
        None, SCHEDULING, "KV block count, overriding the memory-based size.", low=1
    )
    enable_prefix_caching: bool = flag(True, SCHEDULING, "Reuse the KV blocks of equal prompt beginnings.")
    kv_events_config: dict[str, Any] | None = flag(
        None,
        SCHEDULING,
        "Publish what the prefix cache stores and evicts: enable_kv_cache_events, endpoint...",
    )
    max_num_seqs: int | None = flag(
        None,
        SCHEDULING,
        f"Requests that run at once ({DEFAULT_MAX_NUM_SEQS}, at most the token budget).",
        low=1,
    )
    max_num_batched_tokens: int | None = flag(
        None, SCHEDULING, "Tokens in one step.", metavar="TOKENS", low=1, read=human_int
    )
    enable_chunked_prefill: bool = flag(True, SCHEDULING, "Split a long prompt over several steps.")
    long_prefill_token_threshold: int = flag(
        0, SCHEDULING, "Most prompt tokens of one request in a step; 0: no limit.", low=0
    )
    scheduling_policy: str = flag(
        "fcfs",
        SCHEDULING,
        "fcfs; priority: of each request, smaller first; sjf: align lengths, shorter texts first.",
        choices=SCHEDULING_POLICIES,
    )
    async_scheduling: bool | None = flag(
        None, SCHEDULING, "Plan the next step while this one computes; on by default on a GPU."
    )
    max_num_queued_reqs: int | str | None = flag(
        None,
        SCHEDULING,
        f"Requests that may wait ({DEFAULT_MAX_NUM_QUEUED_REQS}); more are answered 503. "
        "auto: those that will be begun within --queue-timeout.",
        metavar="N|auto",
        low=1,
        choices=(AUTO_QUEUE,),
        read=queue_length,
    )
    max_num_queued_tokens: int | None = flag(
        None, SCHEDULING, "Prompt tokens that may wait (16M).", metavar="N", low=1, read=human_int
    )
    queue_timeout: float = flag(
        0.0, SCHEDULING, "Seconds that a request may wait until it is begun; 0: no limit.", low=0
    )
    request_timeout: float = flag(
        0.0, SCHEDULING, "Seconds that a request may take in all; 0: no limit.", low=0
    )

    cpu_threads: int | None = flag(
        None,
        MACHINE,
        "Threads to compute with; one for each physical core, within the cgroup's limit, if not given.",
        low=1,
        high=usable_cores(),
    )
    attention_backend: str = flag(
        "auto",
        MACHINE,
        "What computes. On a CPU: cpu, our kernels in C, compiled at the first start; torch, PyTorch's own "
        "operators, slower; auto, cpu where a C compiler is found, else torch. On a GPU: triton (auto) "
        "or flash_attn.",
    )
    device: str = flag("auto", MACHINE, "auto (a GPU if there is one), cpu or cuda.", choices=DEVICES)
    tensor_parallel_size: int = flag(
        1, MACHINE, "GPUs that hold the model together, or processes on a CPU.", metavar="N", low=1
    )
    data_parallel_size: int = flag(
        1, MACHINE, "Engines behind one port, each with the whole model.", metavar="N", low=1
    )
    data_parallel_size_local: int | None = flag(
        None, MACHINE, "Those of this machine, which is all of them.", metavar="N", low=1
    )
    distributed_executor_backend: str | None = flag(
        None, MACHINE, "mp: a process for each of them.", choices=("mp",)
    )
    gpu_memory_utilization: float = flag(
        GPU_MEMORY_UTILIZATION,
        MACHINE,
        "Part of the GPU's memory to use; no effect on a CPU.",
        metavar="SHARE",
        above=0,
        high=1,
    )
    enforce_eager: bool = flag(False, MACHINE, "Run every step without CUDA graphs.")

    log_step_times: bool = flag(
        False,
        LOGS,
        "Log where the time of steps goes: a table every 10 s while there are requests, one at the end.",
    )

    def resolve(self) -> EngineConfig:
        """Check every option by itself, against the others, against the model and the machine.

        Nothing is compiled or loaded. Raises `ConfigError` with one line that names the option or the file.
        """
        # Here, as it imports numpy, which --help does without.
        from microvllm.runtime.options.generation_config import generation_defaults

        try:
            msgspec.convert(vars(self), type(self))
        except msgspec.ValidationError as error:
            raise ConfigError(f"an engine option has the wrong type: {error}") from None
        check_flags(self)
        path, tokenizer_path = find_model_and_tokenizer(self)
        spec = read_spec(path, self)
        load_format = choose_format(self.load_format, path)
        device = choose_device(self.device)
        backend = choose_backend(self.attention_backend, device)
        dtype = choose_dtype(self.dtype, device, backend)
        stores_fp8 = spec.quantization is not None and spec.quantization.fp8_cache
        kv_dtype = choose_kv_dtype(self.kv_cache_dtype, dtype, backend, stores_fp8=stores_fp8)
        block_size = self.block_size or DEFAULT_BLOCK_SIZES[backend]
        max_model_len = self.max_model_len or spec.default_length
        unpacked = why_unpacked(self.model, load_format, backend)
        batch_invariant = vllm_environment.chosen(self.batch_invariant, "VLLM_BATCH_INVARIANT")
        if batch_invariant and device == "cuda" and not unpacked:
            unpacked = "products with packed weights are not batch-invariant on a GPU"
        float_only = unpacked or (
            (device == "cuda" and "a GPU multiplies packed weights exactly")
            or (
                self.gguf_weights == "dequantized"
                and "--gguf-weights dequantized leaves nothing to multiply in integers"
            )
        )
        too_long = max_model_len > spec.max_position and (
            f"--max-model-len {max_model_len} exceeds the model's context of {spec.max_position} tokens"
        )
        plain_or_method = spec.quantization.method if spec.quantization else None
        stored = "gguf" if path.is_file() else plain_or_method
        spec = quantize(spec, self.quantization, self.quantization_config, stored, self.model)
        _refuse(
            (
                self.max_num_queued_reqs == AUTO_QUEUE and not self.queue_timeout,
                "--max-num-queued-reqs auto needs --queue-timeout",
            ),
            (self.gguf_weights == "packed" and unpacked, f"--gguf-weights packed: {unpacked}"),
            (self.cpu_activations == "int8" and float_only, f"--cpu-activations int8: {float_only}"),
            (
                batch_invariant and backend not in ("cpu", "triton"),
                "--batch-invariant (VLLM_BATCH_INVARIANT=1): --attention-backend must be cpu or triton",
            ),
            (batch_invariant and device == "cuda" and spec.state_bytes(1), start_checks.VARIANT_STATES),
            (
                device == "cpu" and dtype == "float16",
                "--dtype float16 is not available on a CPU",
                "use --dtype bfloat16 or float32",
            ),
            (
                backend == "flash_attn" and block_size % 256,
                f"--block-size {block_size}: flash_attn takes multiples of 256",
            ),
            (
                backend == "triton" and (block_size < 16 or block_size & (block_size - 1)),
                f"--block-size {block_size}: triton takes powers of two from 16 on",
            ),
            (
                self.long_prefill_token_threshold and not self.enable_chunked_prefill,
                "--long-prefill-token-threshold splits prompts, which --no-enable-chunked-prefill forbids",
                "leave one of the two out",
            ),
            (
                too_long and not vllm_environment.is_on("VLLM_ALLOW_LONG_MAX_MODEL_LEN"),
                f"{too_long}; VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 in the environment allows it",
                "lower it, or leave it out: --max-model-len auto takes the model's",
            ),
        )
        start_checks.warn_of_length(too_long)
        start_checks.warn_of_options(self, device, pools=spec.pooling is not None)
        start_checks.warn_of_rotation(spec, max_model_len)
        spec, pooling = spec.at_length(max_model_len), spec.pooling
        num_ranks, num_engines = self.tensor_parallel_size, self.data_parallel_size
        check_engines(num_engines, self.data_parallel_size_local, num_ranks, device)
        shard = check_ranks(num_ranks, spec, device, batch_invariant=batch_invariant)
        budget = self.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS[device]
        if not self.enable_chunked_prefill and self.max_num_batched_tokens is None:
            budget = max(budget, max_model_len)
        # On a CPU all processes take of the same memory.
        sharing = num_ranks * num_engines if device == "cpu" else 1
        caching = start_checks.caches_prefixes(self.enable_prefix_caching, spec)
        row_bytes = shard.state_bytes(KV_BYTES["float32" if backend == "cpu" else dtype]) * sharing
        max_num_seqs = self.max_num_seqs or min(DEFAULT_MAX_NUM_SEQS, budget)
        max_num_seqs = fit_states(device, row_bytes, max_num_seqs, caching, self.max_num_seqs is not None)
        # Off on a CPU: scheduling would compete with the model for the same cores.
        is_async = device == "cuda" if self.async_scheduling is None else self.async_scheduling
        step_tokens = budget * (1 + is_async)
        layout = CacheLayout.of(shard, kv_dtype, block_size, step_tokens, sharing)
        num_blocks, max_model_len = size_cache(
            device,
            layout,
            max_model_len,
            blocks=self.num_gpu_blocks_override,
            cache_bytes=self.kv_cache_memory_bytes,
            may_shorten=self.max_model_len is None,
        )
        _refuse(
            (
                not self.enable_chunked_prefill and budget < max_model_len,
                f"--max-num-batched-tokens {budget} is below the context of {max_model_len} tokens, "
                "and --no-enable-chunked-prefill does not allow prompts to be split",
            ),
            (
                max_num_seqs > budget,
                f"--max-num-seqs {max_num_seqs} exceeds --max-num-batched-tokens {budget}",
            ),
        )
        queued = self.max_num_queued_reqs
        return EngineConfig(
            model=self.model,
            model_path=str(path),
            tokenizer_path=str(tokenizer_path),
            spec=spec,
            load_format=load_format,
            packed_weights=(spec.quantization is not None and device == "cuda")
            or (self.gguf_weights != "dequantized" and not unpacked),
            int8_activations=self.cpu_activations == "int8",
            batch_invariant=batch_invariant,
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            may_shorten=self.max_model_len is None,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=caching,
            kv_events=read_kv_events(self.kv_events_config, caching, num_engines),
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            scheduling_policy=self.scheduling_policy,
            async_scheduling=is_async,
            max_num_queued_reqs=queued if isinstance(queued, int) else DEFAULT_MAX_NUM_QUEUED_REQS,
            max_num_queued_tokens=self.max_num_queued_tokens or DEFAULT_MAX_NUM_QUEUED_TOKENS,
            admit_by_rate=queued == AUTO_QUEUE,
            queue_timeout=self.queue_timeout,
            request_timeout=self.request_timeout,
            seed=self.seed,
            device=device,
            tensor_parallel_size=num_ranks,
            data_parallel_size=num_engines,
            gpu_memory_utilization=self.gpu_memory_utilization,
            # Graphs choose tokens, which a model without a head has none of.
            enforce_eager=self.enforce_eager or pooling is not None,
            attention_backend=backend,
            cpu_threads=max(1, (self.cpu_threads or default_threads()) // (num_ranks * num_engines)),
            generation_defaults=generation_defaults(
                self.generation_config,
                path,
                DEMO_GENERATION_CONFIG if is_demo(self.model) else {},
                self.override_generation_config or {},
                spec.vocab_size,
            ),
            max_logprobs=self.max_logprobs,
            logprobs_mode=self.logprobs_mode,
            log_step_times=self.log_step_times,
        )

    def prepare(self, on_progress: OnProgress | None = None) -> EngineConfig:
        """Resolve the options, and compile the CPU kernels if they are used; torch replaces what fails."""
        config = self.resolve()
        if config.attention_backend == "cpu":
            backend = compile_kernels(self.attention_backend, on_progress)
            if backend != "cpu":
                return replace(self, attention_backend=backend).resolve()
        return config


def _refuse(*rows: tuple[Any, ...]) -> None:
    """Raise `ConfigError` for the first row that holds: (condition, problem), or with a remedy as well."""
    for condition, problem, *remedy in rows:
        if condition:
            raise ConfigError(problem, remedy=remedy[0] if remedy else None)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The resolved configuration; it is sent to the engine process as msgpack."""

    model: str
    model_path: str
    tokenizer_path: str
    spec: ModelSpec
    load_format: str
    dtype: str
    kv_dtype: str  # of the KV cache, by torch's name
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int  # of the KV cache, for all groups of layers
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    scheduling_policy: str
    async_scheduling: bool
    max_num_queued_reqs: int | None
    seed: int
    attention_backend: str
    cpu_threads: int
    may_shorten: bool = False  # the context, to what the KV cache of a GPU holds
    packed_weights: bool = False  # matrices stay as the model's files quantise them where operators take that
    int8_activations: bool = False  # in integers: activations are rounded to 8 bits for that
    batch_invariant: bool = False  # an answer does not depend on what is computed beside it
    device: str = "cpu"
    tensor_parallel_size: int = 1  # processes, each with a device, that hold the model together
    data_parallel_size: int = 1  # engines of the server, ...
    data_parallel_rank: int = 0  # ... and the number of this one
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    enforce_eager: bool = False
    generation_defaults: dict[str, Any] = {}
    max_logprobs: int = 20  # that a request may ask for; -1: no limit
    logprobs_mode: str = "raw_logprobs"
    max_num_queued_tokens: int | None = None  # of the prompts that wait
    admit_by_rate: bool = False  # only what is predicted to leave the queue within `queue_timeout`
    queue_timeout: float = 0.0  # seconds from arrival until the request is begun; 0: no limit
    request_timeout: float = 0.0  # seconds from arrival to the end; 0: no limit
    kv_events: KVEventsConfig | None = None
    log_step_times: bool = False  # measure the parts of steps more finely, and write tables of them

    @property
    def state_rows(self) -> int:
        """Rows that layers with a state keep: see `kv_memory.state_rows`."""
        return state_rows(self.spec, self.max_num_seqs, caches=self.enable_prefix_caching)

    @property
    def num_groups(self) -> int:
        """Of the layers on a rank, see `ModelSpec.cache_plan`: each has a block table for a request."""
        return len(self.spec.sharded(self.tensor_parallel_size).cache_plan.windows)

    @property
    def max_blocks(self) -> int:
        """KV blocks of a sequence that fills the context."""
        return -(-self.max_model_len // self.block_size)
