"""Prompts, parameters and options for tests of `LLM`."""

from __future__ import annotations

from typing import Any

from microvllm import SamplingParams

PROMPTS = ["The quick brown fox", "The cache keeps", "x"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "cpu_threads": 1,
    "num_gpu_blocks_override": 256,
    "max_num_seqs": 8,
}


def texts(results: list[Any]) -> list[str]:
    return [result.outputs[0].text for result in results]
