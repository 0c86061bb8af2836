"""microvllm: a compact LLM inference engine behind an OpenAI-compatible server."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from microvllm.runtime.threads import thread_environment

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineArgs
    from microvllm.runtime.engine import InferenceEngine
    from microvllm.runtime.llm import LLM
    from microvllm.runtime.llm_engine import LLMEngine
    from microvllm.runtime.offline_prompts import TextPrompt, TokensPrompt
    from microvllm.runtime.request_output import CompletionOutput, RequestOutput
    from microvllm.runtime.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "InferenceEngine",
    "LLMEngine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
]

_HOMES = {
    "EngineArgs": "microvllm.runtime.config",
    "InferenceEngine": "microvllm.runtime.engine",
    "LLM": "microvllm.runtime.llm",
    "LLMEngine": "microvllm.runtime.llm_engine",
    "TextPrompt": "microvllm.runtime.offline_prompts",
    "TokensPrompt": "microvllm.runtime.offline_prompts",
    "CompletionOutput": "microvllm.runtime.request_output",
    "RequestOutput": "microvllm.runtime.request_output",
    "BeamSearchParams": "microvllm.runtime.sampling_params",
    "RequestOutputKind": "microvllm.runtime.sampling_params",
    "SamplingParams": "microvllm.runtime.sampling_params",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the engine imports torch (seconds), which the API process and `--help` must not.
    if name in _HOMES:
        if "torch" not in sys.modules:
            os.environ.update(thread_environment())  # read by OpenMP when torch loads it
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'microvllm' has no attribute {name!r}")
