"""`EngineArgs`, what the user wished, and `EngineConfig`, what was resolved from it and from the model.

Nothing here imports torch: the API process resolves the configuration, the engine process receives it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from microvllm.adapters.errors import ModelFileError, OverrideError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import ModelSpec
from microvllm.ops.cpu.build import NoCompilerError, load_kernels
from microvllm.ops.cpu.isa import IsaError, has_bf16
from microvllm.runtime import machine, vllm_environment, vllm_values
from microvllm.runtime.core.policies import POLICIES
from microvllm.runtime.errors import MODEL_FILE_REMEDY, ConfigError
from microvllm.runtime.find_model import DEMO_GENERATION_CONFIG, find_model, is_demo
from microvllm.runtime.generation_config import generation_defaults
from microvllm.runtime.kv_memory import cpu_pool, gpu_pool
from microvllm.runtime.machine import choose_device
from microvllm.runtime.request import INT64_MAX, INT64_MIN

logger = logging.getLogger("microvllm.config")

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
GGUF_WEIGHTS = ("auto", "packed", "dequantized")
CPU_ACTIVATIONS = ("float32", "int8")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
CPU_BACKENDS, GPU_BACKENDS = ("cpu", "torch"), ("triton", "flash_attn")
# FlashAttention 2's paged kernel takes multiples of 256; a tile of our Triton kernels is one block.
DEFAULT_BLOCK_SIZES = {"cpu": 16, "torch": 16, "triton": 64, "flash_attn": 256}
# A benchmark's client sends 10,000 prompts at once; as many requests as there may be connections.
DEFAULT_MAX_NUM_QUEUED_REQS = 1 << 14
DEFAULT_MAX_NUM_QUEUED_TOKENS = 1 << 24
AUTO_QUEUE = "auto"
DEFAULT_MAX_NUM_SEQS = 256
GPU_MEMORY_UTILIZATION = 0.92
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(kw_only=True)
class EngineArgs:
    """Engine options under vLLM's names; None means "decide from the model and the machine"."""

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    async_scheduling: bool | None = None
    max_num_queued_reqs: int | str | None = None
    max_num_queued_tokens: int | None = None
    queue_timeout: float = 0.0
    request_timeout: float = 0.0
    seed: int = 0
    hf_overrides: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    load_format: str = "auto"
    gguf_weights: str = "auto"
    cpu_activations: str = "float32"
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    device: str = "auto"
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    enforce_eager: bool = False
    attention_backend: str = "auto"
    cpu_threads: int | None = None
    log_step_times: bool = False

    def resolve(self) -> EngineConfig:
        """Check every wish against the model and the machine.

        Raises `ConfigError` with one line that names the option or the file.
        """
        try:
            msgspec.convert(vars(self), type(self))
        except msgspec.ValidationError as error:
            raise ConfigError(f"an engine option has the wrong type: {error}") from None
        path = find_model(self.model)
        try:
            spec = load_spec(path, self._overrides())
        except OverrideError as error:
            raise ConfigError(str(error)) from error  # the flag that it names has the remedy
        except ModelFileError as error:
            raise ConfigError(str(error), remedy=MODEL_FILE_REMEDY) from error
        load_format = self._load_format(path)
        device = choose_device(self.device)
        if device == "cpu" and (self.enforce_eager or self.gpu_memory_utilization != GPU_MEMORY_UTILIZATION):
            logger.warning(
                "--gpu-memory-utilization and --enforce-eager have no effect on a CPU; "
                "--kv-cache-memory-bytes sets the size of the KV cache there"
            )
        backend = self._cpu_backend() if device == "cpu" else self._gpu_backend()
        dtype = self._dtype(device, backend)
        block_size = _positive(self.block_size, DEFAULT_BLOCK_SIZES[backend], "--block-size")
        if device == "cuda":
            _check_gpu_block(block_size, backend)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        if self.scheduling_policy not in POLICIES:
            raise ConfigError(
                f"--scheduling-policy must be one of {', '.join(POLICIES)}, got {self.scheduling_policy}"
            )
        queued_reqs = self._queued_reqs()
        if self.long_prefill_token_threshold < 0:
            raise ConfigError("--long-prefill-token-threshold must not be negative")
        max_model_len = _positive(self.max_model_len, spec.default_length, "--max-model-len")
        if max_model_len > spec.max_position:
            problem = (
                f"--max-model-len {max_model_len} exceeds the model's context of {spec.max_position} tokens"
            )
            if not vllm_environment.is_on("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
                raise ConfigError(
                    f"{problem}; VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 in the environment allows it",
                    remedy="lower it, or leave it out: --max-model-len auto takes what memory allows",
                )
            logger.warning("%s: answers beyond it may make no sense", problem)
        rope = spec.rope
        if rope.depends_on_length and max_model_len > rope.original_max_position:
            logger.warning(
                "Rotary scaling %s: short texts are rotated as texts of %d tokens are. --max-model-len %d, "
                "the length that the model was first trained on, keeps them as they were.",
                *(rope.scaling, max_model_len, rope.original_max_position),
            )
        spec = msgspec.structs.replace(spec, rope=rope.at_length(max_model_len, spec.head_dim))
        block_bytes = spec.kv_bytes_per_token(DTYPE_BYTES[dtype]) * block_size
        requested = self._requested_blocks(block_bytes)
        if device == "cpu":
            num_blocks, max_model_len = cpu_pool(
                requested, block_bytes, block_size, max_model_len, may_shorten=self.max_model_len is None
            )
        else:
            num_blocks = gpu_pool(requested, block_size, max_model_len)
        budget = _positive(
            self.max_num_batched_tokens, DEFAULT_MAX_NUM_BATCHED_TOKENS[device], "--max-num-batched-tokens"
        )
        if not self.enable_chunked_prefill and budget < max_model_len:
            if self.max_num_batched_tokens is not None:
                raise ConfigError(
                    f"--max-num-batched-tokens {budget} is below the context of {max_model_len} tokens, "
                    "and --no-enable-chunked-prefill does not allow prompts to be split"
                )
            budget = max_model_len
        max_num_seqs = _positive(self.max_num_seqs, min(DEFAULT_MAX_NUM_SEQS, budget), "--max-num-seqs")
        if max_num_seqs > budget:
            raise ConfigError(f"--max-num-seqs {max_num_seqs} exceeds --max-num-batched-tokens {budget}")
        threads = _positive(self.cpu_threads, machine.default_threads(), "--cpu-threads")
        if threads > machine.usable_cores():
            raise ConfigError(f"--cpu-threads {threads} exceeds the {machine.usable_cores()} cores there are")
        if self.max_logprobs < -1:
            raise ConfigError(f"--max-logprobs must be at least -1 (no limit), got {self.max_logprobs}")
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(
                f"--logprobs-mode must be one of {', '.join(LOGPROBS_MODES)}, got {self.logprobs_mode}"
            )
        if not INT64_MIN <= self.seed <= INT64_MAX:
            raise ConfigError(f"--seed must fit 64 bits, got {self.seed}")
        return EngineConfig(
            model=self.model,
            model_path=str(path),
            tokenizer_path=str(find_model(self.tokenizer, "--tokenizer")) if self.tokenizer else str(path),
            spec=spec,
            load_format=load_format,
            packed_weights=self._packed_weights(load_format, backend),
            int8_activations=self._int8_activations(load_format, backend),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            scheduling_policy=self.scheduling_policy,
            # On a CPU the scheduler would take from the model what it gains: they share the cores.
            async_scheduling=device == "cuda" if self.async_scheduling is None else self.async_scheduling,
            max_num_queued_reqs=queued_reqs,
            max_num_queued_tokens=_positive(
                self.max_num_queued_tokens, DEFAULT_MAX_NUM_QUEUED_TOKENS, "--max-num-queued-tokens"
            ),
            admit_by_rate=self.max_num_queued_reqs == AUTO_QUEUE,
            queue_timeout=self.queue_timeout,
            request_timeout=self.request_timeout,
            seed=self.seed,
            device=device,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
            attention_backend=backend,
            cpu_threads=threads,
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

    def _requested_blocks(self, block_bytes: int) -> int | None:
        """The KV blocks that were requested; None if the machine decides."""
        if self.num_gpu_blocks_override is not None:
            return _positive(self.num_gpu_blocks_override, 0, "--num-gpu-blocks-override")
        if self.kv_cache_memory_bytes is not None:
            return _positive(self.kv_cache_memory_bytes, 0, "--kv-cache-memory-bytes") // block_bytes
        return None

    def _queued_reqs(self) -> int:
        """How many requests may wait; checks the options of time beside it."""
        for name in ("queue_timeout", "request_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least 0 seconds (0: no limit), got {value}")
        wish = self.max_num_queued_reqs
        if wish == AUTO_QUEUE:
            if not self.queue_timeout:
                raise ConfigError("--max-num-queued-reqs auto needs --queue-timeout")
            return DEFAULT_MAX_NUM_QUEUED_REQS
        if wish is not None and (isinstance(wish, str) or wish < 1):
            raise ConfigError(f"--max-num-queued-reqs must be at least 1, or auto, got {wish}")
        return DEFAULT_MAX_NUM_QUEUED_REQS if wish is None else wish

    def _overrides(self) -> dict[str, Any]:
        """Values in place of those of config.json; the two rotary options are the older way to say it."""
        rotary = {"rope_scaling": self.rope_scaling, "rope_theta": self.rope_theta}
        return {
            **(self.hf_overrides or {}),
            **{key: value for key, value in rotary.items() if value is not None},
        }

    def _load_format(self, path: Path) -> str:
        wish = vllm_values.load_format(self.load_format)
        if wish not in LOAD_FORMATS:
            raise ConfigError(
                f"--load-format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format}"
            )
        actual = "gguf" if path.is_file() else "safetensors"
        if wish in ("auto", actual):
            return actual
        if wish == "dummy":
            return "dummy"
        raise ConfigError(f"--load-format {self.load_format} does not fit {path}, which is {actual}")

    def _packed_weights(self, load_format: str, backend: str) -> bool:
        wish = self.gguf_weights
        if wish not in GGUF_WEIGHTS:
            raise ConfigError(f"--gguf-weights must be one of {', '.join(GGUF_WEIGHTS)}, got {wish}")
        problem = self._no_packed_weights(load_format, backend)
        if wish == "packed" and problem:
            raise ConfigError(f"--gguf-weights packed: {problem}")
        return wish != "dequantized" and not problem

    def _no_packed_weights(self, load_format: str, backend: str) -> str | None:
        """Why packed weights cannot be had; None if they can."""
        if load_format != "gguf":
            return f"{self.model} is not read from a GGUF file"
        if backend != "cpu":
            return (
                "only the CPU kernels (--device cpu --attention-backend cpu) multiply packed weights, "
                f"{backend} does not"
            )
        return None

    def _int8_activations(self, load_format: str, backend: str) -> bool:
        wish = self.cpu_activations
        if wish not in CPU_ACTIVATIONS:
            raise ConfigError(f"--cpu-activations must be one of {', '.join(CPU_ACTIVATIONS)}, got {wish}")
        problem = self._no_packed_weights(load_format, backend)
        if not problem and self.gguf_weights == "dequantized":
            problem = "--gguf-weights dequantized leaves nothing to multiply in integers"
        if wish == "int8" and problem:
            raise ConfigError(f"--cpu-activations int8: {problem}")
        return wish == "int8"

    def _gpu_backend(self) -> str:
        wish = vllm_values.attention_backend(self.attention_backend)
        if wish == "auto":
            # Qwen3-0.6B on an H100: a third faster than flash_attn at one request, and as fast at 64.
            return "triton"
        if wish not in GPU_BACKENDS:
            raise ConfigError(
                f"--attention-backend {self.attention_backend}: a GPU has 'auto', 'triton' and 'flash_attn'"
            )
        if wish == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "--attention-backend flash_attn: the package is missing", remedy="pip install flash-attn"
            )
        return wish

    def _cpu_backend(self) -> str:
        """Which operators run the model: our kernels where they can be compiled, else plain torch."""
        wish = vllm_values.attention_backend(self.attention_backend)
        if wish == "torch":
            return "torch"
        if wish not in ("auto", "cpu"):
            raise ConfigError(
                f"--attention-backend {self.attention_backend}: 'auto', 'cpu' and 'torch' exist on a CPU"
            )
        try:
            load_kernels()
        except IsaError as error:
            raise ConfigError(str(error)) from error
        except NoCompilerError as error:
            if wish == "cpu":
                raise ConfigError(
                    f"--attention-backend cpu: {error}",
                    remedy="install a C compiler (apt-get install gcc), or use --attention-backend torch",
                ) from error
            logger.warning("Plain torch operators are used, which are slower: %s", error)
            return "torch"
        return "cpu"

    def _dtype(self, device: str, backend: str) -> str:
        wish = DTYPE_ALIASES.get(self.dtype, self.dtype)
        if wish == "auto":
            if device == "cuda":
                return "bfloat16"
            # torch's operators are slow in bf16 on a CPU without bf16 arithmetic; our kernels are not.
            return "bfloat16" if backend == "cpu" or has_bf16() else "float32"
        if wish not in DTYPE_BYTES:
            raise ConfigError(
                f"--dtype must be auto, float32, bfloat16 or float16 (half, float), got {self.dtype}"
            )
        if wish == "float16" and device == "cpu":
            raise ConfigError(
                "--dtype float16 is not available on a CPU", remedy="use --dtype bfloat16 or float32"
            )
        return wish


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine needs to know, resolved; travels to the engine process as msgpack."""

    model: str
    model_path: str
    tokenizer_path: str
    spec: ModelSpec
    load_format: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    scheduling_policy: str
    async_scheduling: bool
    max_num_queued_reqs: int | None
    seed: int
    attention_backend: str
    cpu_threads: int
    packed_weights: bool = False  # matrices of a GGUF file are multiplied from their own blocks
    int8_activations: bool = False  # in integers: activations are rounded to 8 bits for that
    device: str = "cpu"
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    enforce_eager: bool = False
    generation_defaults: dict[str, Any] = {}
    max_logprobs: int = 20  # that a request may ask for; -1: no limit
    logprobs_mode: str = "raw_logprobs"
    max_num_queued_tokens: int | None = None  # of the prompts that wait
    admit_by_rate: bool = False  # only what is predicted to leave the queue within `queue_timeout`
    queue_timeout: float = 0.0  # seconds from arrival until the request is begun; 0: no limit
    request_timeout: float = 0.0  # seconds from arrival to the end; 0: no limit
    log_step_times: bool = False  # measure the parts of steps more finely, and write tables of them

    @property
    def max_blocks(self) -> int:
        """Blocks of a sequence that fills the context."""
        return -(-self.max_model_len // self.block_size)


def _check_gpu_block(block_size: int, backend: str) -> None:
    if backend == "flash_attn" and block_size % 256:
        raise ConfigError(f"--block-size {block_size}: flash_attn takes multiples of 256")
    if backend == "triton" and (block_size < 16 or block_size & (block_size - 1)):
        raise ConfigError(f"--block-size {block_size}: triton takes powers of two from 16 on")


def _positive(value: int | None, default: int, option: str) -> int:
    if value is None:
        return default
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, got {value}")
    return value
