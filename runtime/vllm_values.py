"""Values of vLLM's engine options that are other names for ours, or only tune."""

from __future__ import annotations

import logging

from microvllm.runtime.errors import ConfigError

logger = logging.getLogger("microvllm.config")

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


def load_format(value: str) -> str:
    """Ours for a load format of vLLM. Raises `ConfigError` for one whose files are not read here."""
    name = value.lower()
    if name == "hf":
        return "auto"
    if name in SAFETENSORS_READERS:
        logger.warning("--load-format %s is read as safetensors: it only tunes how they are read", value)
        return "safetensors"
    if name in OTHER_FILES:
        raise ConfigError(
            f"--load-format {value} reads {OTHER_FILES[name]}: only safetensors and GGUF files are read here"
        )
    return name


def attention_backend(value: str) -> str:
    """Ours for an attention backend of vLLM, which are chosen for speed alone."""
    name = value.lower()
    if name in ATTENTION_BACKENDS:
        logger.warning("--attention-backend %s has no effect here: auto is taken", value)
        return "auto"
    return name
