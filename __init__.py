"""microvllm: a compact LLM inference engine behind an OpenAI-compatible server."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from microvllm.runtime.machine import thread_environment

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineArgs
    from microvllm.runtime.engine import InferenceEngine
    from microvllm.runtime.offline.llm import LLM
    from microvllm.runtime.offline.llm_engine import LLMEngine
    from microvllm.runtime.offline.pooling import PoolingParams, PoolingRequestOutput
    from microvllm.runtime.offline.prompts import TextPrompt, TokensPrompt
    from microvllm.runtime.offline.request_output import CompletionOutput, RequestOutput
    from microvllm.runtime.offline.sampling_params import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "InferenceEngine",
    "LLMEngine",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

_HOMES = {
    "EngineArgs": "microvllm.runtime.config",
    "InferenceEngine": "microvllm.runtime.engine",
    "LLM": "microvllm.runtime.offline.llm",
    "LLMEngine": "microvllm.runtime.offline.llm_engine",
    "PoolingParams": "microvllm.runtime.offline.pooling",
    "PoolingRequestOutput": "microvllm.runtime.offline.pooling",
    "TextPrompt": "microvllm.runtime.offline.prompts",
    "TokensPrompt": "microvllm.runtime.offline.prompts",
    "CompletionOutput": "microvllm.runtime.offline.request_output",
    "RequestOutput": "microvllm.runtime.offline.request_output",
    "BeamSearchParams": "microvllm.runtime.offline.sampling_params",
    "RequestOutputKind": "microvllm.runtime.offline.sampling_params",
    "SamplingParams": "microvllm.runtime.offline.sampling_params",
    "StructuredOutputsParams": "microvllm.runtime.offline.sampling_params",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the engine imports torch (seconds), which the API process and `--help` must not.
    if name in _HOMES:
        collects = gc.isenabled()
        if "torch" not in sys.modules:
            os.environ.update(thread_environment())  # read by OpenMP when torch loads it
            gc.disable()  # nothing imported is ever freed: a fifth of the time went to looking
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        finally:
            if collects:
                gc.enable()
    raise AttributeError(f"module 'microvllm' has no attribute {name!r}")
