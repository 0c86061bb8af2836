"""An `LLM` for each file that asks for one."""

from __future__ import annotations

import pytest
from llm_case import OPTIONS
from model_tools import variant_folder

from microvllm import LLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(variant_folder("llama-tied")), **OPTIONS)
