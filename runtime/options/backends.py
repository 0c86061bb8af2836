"""Chooses the format that weights are read in, the operators that compute, and their type.

Values of vLLM's options that are other names for ours, or only tune, are understood.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from microvllm.ops.cpu.isa import IsaError, has_bf16
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.progress import OnProgress, Stage

if TYPE_CHECKING:
    from microvllm.ops.cpu.build import NoCompilerError

logger = logging.getLogger("microvllm.config")

FP8_CACHE = "float8_e4m3fn"
FP8_CACHE_BACKENDS = ("triton", "torch")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
# FlashAttention 2's paged kernel takes multiples of 256; a tile of our Triton kernels is one block.
DEFAULT_BLOCK_SIZES = {"cpu": 16, "torch": 16, "triton": 64, "flash_attn": 256}
# All read the same safetensors files, by other means.
SAFETENSORS_READERS = ("fastsafetensors", "instanttensor", "runai_streamer")
OTHER_FILES = {
    "pt": "PyTorch's pickled files",
    "npcache": "PyTorch's pickled files",
    "mistral": "Mistral's consolidated files",
    "tensorizer": "files of tensorizer",
    "sharded_state": "a shard for each rank",
    "runai_streamer_sharded": "a shard for each rank",
    "ipc_cache": "the memory of another process",
    "modelexpress": "the memory of another server",
}
# Other kernels for the same attention.
ATTENTION_BACKENDS = """
    cpu_attn flash_attn_diffkv flashinfer flex_attention rocm_aiter_fa rocm_aiter_unified_attn rocm_attn
    rocm_segmented_attn torch_sdpa tree_attn triton_attn triton_attn_diffkv triton_flash_attn
    triton_flashinfer xformers
""".split()


def choose_format(requested: str, path: Path) -> str:
    """Return safetensors, gguf or dummy, for `--load-format`. Raises `ConfigError` if it does not fit."""
    name = requested.lower()
    if name == "hf":
        name = "auto"
    elif name in SAFETENSORS_READERS:
        logger.warning("--load-format %s is read as safetensors: it only tunes how they are read", requested)
        name = "safetensors"
    elif name in OTHER_FILES:
        raise ConfigError(
            f"--load-format {requested} reads {OTHER_FILES[name]}: "
            "only safetensors and GGUF files are read here"
        )
    if name not in LOAD_FORMATS:
        raise ConfigError(f"--load-format must be one of {', '.join(LOAD_FORMATS)}, got {requested}")
    actual = "gguf" if path.is_file() else "safetensors"
    if name not in ("auto", "dummy", actual):
        raise ConfigError(f"--load-format {requested} does not fit {path}, which is {actual}")
    return "dummy" if name == "dummy" else actual


def choose_backend(requested: str, device: str) -> str:
    """Return the operators that run the model, for `--attention-backend`.

    On a CPU: "cpu", our kernels, where there is a C compiler, else "torch". Raises `ConfigError` for one that
    is not there.
    """
    name = requested.lower()
    if name in ATTENTION_BACKENDS:
        logger.warning("--attention-backend %s has no effect here: auto is taken", requested)
        name = "auto"
    if device == "cuda":
        return _gpu_backend(requested, name)
    if name == "torch":
        return "torch"
    if name not in ("auto", "cpu"):
        raise ConfigError(f"--attention-backend {requested}: 'auto', 'cpu' and 'torch' exist on a CPU")
    from microvllm.ops.cpu.build import NoCompilerError, check_compiler

    try:
        check_compiler()
    except IsaError as error:
        raise ConfigError(str(error)) from error
    except NoCompilerError as error:
        return torch_instead(requested, error)
    return "cpu"


def _gpu_backend(requested: str, name: str) -> str:
    if name == "auto":
        # Qwen3-0.6B on an H100: a third faster than flash_attn at one request, and as fast at 64.
        return "triton"
    if name not in ("triton", "flash_attn"):
        raise ConfigError(f"--attention-backend {requested}: a GPU has 'auto', 'triton' and 'flash_attn'")
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "--attention-backend flash_attn: the package is missing", remedy="pip install flash-attn"
        )
    return name


def torch_instead(requested: str, reason: NoCompilerError) -> str:
    """Return "torch", with a warning, where "cpu" cannot be built. Raises `ConfigError` if it has to be."""
    if requested.lower() == "cpu":
        raise ConfigError(
            f"--attention-backend cpu: {reason}",
            remedy=f"{reason.remedy}, or use --attention-backend torch",
        ) from reason
    logger.warning("Plain torch operators are used, which are slower: %s; %s", reason, reason.remedy)
    return "torch"


def choose_kv_dtype(requested: str, dtype: str, backend: str, *, stores_fp8: bool) -> str:
    """Return the type of cached keys and values by torch's name, for `--kv-cache-dtype`.

    `dtype`: the activations'; `stores_fp8`: the checkpoint was made for a cache of fp8. Raises `ConfigError`.
    """
    name = DTYPE_ALIASES.get(requested, requested)
    computes_fp8 = backend in FP8_CACHE_BACKENDS
    if name == "auto":
        if stores_fp8 and not computes_fp8:
            logger.warning(
                "The checkpoint is made for a KV cache of fp8, which --attention-backend %s does not have: "
                "it is of %s",
                *(backend, dtype),
            )
        return FP8_CACHE if stores_fp8 and computes_fp8 else dtype
    if name in ("fp8", "fp8_e4m3"):
        if not computes_fp8:
            others = " or ".join(FP8_CACHE_BACKENDS)
            raise ConfigError(
                f"--kv-cache-dtype {requested}: --attention-backend {backend} has no such KV cache",
                remedy=f"use --attention-backend {others}, or --kv-cache-dtype auto",
            )
        return FP8_CACHE
    if name != dtype:
        raise ConfigError(
            f"--kv-cache-dtype must be auto, fp8, fp8_e4m3 or --dtype's {dtype}, got {requested}"
        )
    return dtype


def choose_dtype(requested: str, device: str, backend: str) -> str:
    """Return the type of activations and of weights that are not packed, for `--dtype`."""
    if requested != "auto":
        return DTYPE_ALIASES.get(requested, requested)
    # torch's operators are slow in bf16 on a CPU without bf16 arithmetic; our kernels are not.
    return "bfloat16" if device == "cuda" or backend == "cpu" or has_bf16() else "float32"


def why_unpacked(model: str, load_format: str, backend: str) -> str | None:
    """Return why weights cannot stay packed as in the model's file; None if they can."""
    if load_format != "gguf":
        return f"{model} is not read from a GGUF file"
    return f"--attention-backend {backend} does not multiply packed weights" if backend == "torch" else None


def compile_kernels(requested: str, on_progress: OnProgress | None) -> str:
    """Compile the CPU kernels unless that was done before, and return the backend: "torch" if it fails.

    Raises `ConfigError` if it fails for `--attention-backend cpu`.
    """
    from microvllm.ops.cpu.build import NoCompilerError, load_kernels

    stages: list[Stage] = []
    try:
        load_kernels(lambda: stages.append(Stage("Compiling CPU kernels", 1, on_progress)))
    except NoCompilerError as error:
        return torch_instead(requested, error)
    for stage in stages[-1:]:
        stage.finish(f"Compiled CPU kernels in {stage.seconds:.1f} s")
    return "cpu"
