"""microvllm: a compact LLM inference engine behind an OpenAI-compatible server."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from microvllm.runtime.threads import thread_environment

if TYPE_CHECKING:
    from microvllm.runtime.engine import InferenceEngine
    from microvllm.runtime.llm import LLM, CompletionOutput, RequestOutput
    from microvllm.runtime.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "InferenceEngine", "RequestOutput", "SamplingParams"]

_HOMES = {
    "InferenceEngine": "microvllm.runtime.engine",
    "LLM": "microvllm.runtime.llm",
    "RequestOutput": "microvllm.runtime.llm",
    "CompletionOutput": "microvllm.runtime.llm",
    "SamplingParams": "microvllm.runtime.request",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the engine imports torch (seconds), which the API process and `--help` must not.
    if name in _HOMES:
        if "torch" not in sys.modules:
            os.environ.update(thread_environment())  # read by OpenMP when torch loads it
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'microvllm' has no attribute {name!r}")
