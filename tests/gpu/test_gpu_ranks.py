"""Two GPUs that hold a model together give the tokens of one."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from model_tools import generate_ids, make_engine, make_prompts, make_request, run_requests
from tiny_models import make_hf_folder

from microvllm.ops.gpu.levers import OPT_IN_VARIABLE
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import EngineError
from microvllm.runtime.worker.parallel.runner import ParallelRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "tie": True},
    "one-kv-head": {"family": "llama", "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
}
PROMPTS = make_prompts(12, 300, seed=1)
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.0, "repetition_penalty": 1.3, "min_tokens": 5, "logit_bias": {7: 4.0}},
    {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 2},
)


@functools.cache
def models() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="microvllm-ranks-")


@functools.cache
def folder(name: str) -> Path:
    options = {**SIZES, **MODELS[name]}
    return make_hf_folder(Path(models().name) / name, options.pop("family"), **options)


def engine(name: str, ranks: int, **options: Any) -> InferenceEngine:
    defaults = {"device": "cuda", "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    return make_engine(folder(name), tensor_parallel_size=ranks, **{**defaults, **options})


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize("own", [False, True], ids=["nccl", "own"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {}),
        ("one-kv-head", {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 14, "max_model_len": 128}),
        ("one-kv-head", {"enforce_eager": True, "async_scheduling": False}),
    ],
    ids=["graphs", "chunked-preempted", "eager"],
)
def test_tokens_in_float32_are_those_of_one_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], own: bool
) -> None:
    """With sums by NCCL, and by the own kernel."""
    monkeypatch.setenv(OPT_IN_VARIABLE, "peers" if own else "")
    one, two = (engine(name, ranks, dtype="float32", **options) for ranks in (1, 2))
    assert isinstance(two.core._runner, ParallelRunner)
    assert generate_ids(two, PROMPTS, 40) == generate_ids(one, PROMPTS, 40)
    assert generate_ids(two, PROMPTS, 40) == generate_ids(one, PROMPTS, 40), "with the prefix cache"
    for params in SAMPLED:
        requests = [
            [make_request(i, prompt, 30, **params) for i, prompt in enumerate(PROMPTS)] for _ in range(2)
        ]
        assert run_requests(two, requests[0]) == run_requests(one, requests[1]), params
    if not options.get("enforce_eager"):
        assert two.core.stats().graph_replays > 0


def test_a_rank_that_is_killed_ends_the_step_and_frees_its_gpu() -> None:
    two = engine("qwen2", 2, dtype="bfloat16", num_gpu_blocks_override=4096)
    runner = two.core._runner
    assert isinstance(runner, ParallelRunner)
    (rank,) = runner._processes._ranks
    for i, prompt in enumerate(PROMPTS):
        two.core.add(make_request(i, prompt, 400))
    for _ in range(20):
        two.core.step()
    started = time.monotonic()
    os.kill(rank.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"rank 1 \(process {rank.pid}\) died \(killed by signal 9\)"):
        for _ in range(1000):
            two.core.step()
    assert time.monotonic() - started < 10
    listed = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    assert (
        str(rank.pid)
        not in subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()
    )
