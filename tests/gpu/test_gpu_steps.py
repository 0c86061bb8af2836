"""The times of steps as the GPU's own clock has them, and what is told while an engine starts there."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import generate_ids, make_engine, make_prompts, variant_folder
from torch.profiler import ProfilerActivity, profile

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.worker.device import GpuDevice
from microvllm.runtime.worker.model_runner import ModelGraphRunner
from microvllm.runtime.worker.step_times import GPU_BUSY, GPU_IDLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
VOCAB = 300
TOKENS = 40
PROMPTS = make_prompts(8, VOCAB, seed=3)


def engine(**options: Any) -> InferenceEngine:
    defaults = {"device": "cuda", "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    return make_engine(variant_folder("llama-tied"), **{**defaults, **options})


def runner_of(made: InferenceEngine) -> ModelGraphRunner:
    runner = made.core._runner
    assert isinstance(runner, ModelGraphRunner)
    return runner


@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": False}, {"enforce_eager": True}, {"max_num_batched_tokens": 24}],
    ids=["graphs", "sync", "eager", "chunked"],
)
def test_the_gpu_s_times_fit_into_the_time_that_passed(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = engine(log_step_times=True, **options)
    plain = engine(**options)
    assert runner_of(plain).device_clock is None and plain.core.report is None
    report = made.core.report
    assert report is not None
    start = time.perf_counter()
    tokens = generate_ids(made, PROMPTS, TOKENS)
    passed = time.perf_counter() - start
    assert tokens == generate_ids(plain, PROMPTS, TOKENS), "measuring changes a token"
    stats = made.core.stats()
    busy, idle = stats.step_seconds[-2:]
    assert busy > 0 and idle >= 0
    assert busy + idle <= passed
    tallies = report._part.kinds
    assert sum(tally.steps for tally in tallies.values()) == stats.steps
    for part, seconds in ((GPU_BUSY, busy), (GPU_IDLE, idle)):
        assert sum(tally.seconds[part] for tally in tallies.values()) == pytest.approx(seconds)
    assert tallies["decode"].seconds[GPU_BUSY] > 0 and tallies["prefill"].seconds[GPU_BUSY] > 0
    report.write()
    table = capsys.readouterr().err
    assert GPU_BUSY in table and GPU_IDLE in table and "embedding" not in table
    replays = re.search(r"^([\d,]+) steps ran as a CUDA graph", table, re.MULTILINE)
    assert (replays is None) == bool(options.get("enforce_eager")), table
    if replays is not None:
        assert int(replays[1].replace(",", "")) == stats.graph_replays


def test_busy_is_what_the_profiler_sees() -> None:
    """All kernels lie within the busy time, and busy and idle time together are the time from end to end."""
    made = engine(log_step_times=True)
    generate_ids(made, PROMPTS, TOKENS)
    before = made.core.stats()
    made.core.clock.enter("idle")  # the profiler takes its time to start
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        generate_ids(made, PROMPTS, TOKENS)
        torch.cuda.synchronize()
    after = made.core.stats()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type.name == "CUDA"
    )
    kernels, end = 0.0, spans[0][0]
    for start, stop in spans:
        kernels += max(0.0, stop - max(start, end))
        end = max(end, stop)
    busy, idle = np.subtract(after.step_seconds[-2:], before.step_seconds[-2:])
    whole = (end - spans[0][0]) / 1e6
    # What is copied to the GPU before a step, and rows that are cleared, are not of the step.
    assert 0.8 * kernels / 1e6 <= busy <= 1.05 * whole
    assert busy + idle <= 1.05 * whole


def test_time_without_requests_is_not_idle_time() -> None:
    made = engine(log_step_times=True)
    made.generate(["fox"], max_tokens=TOKENS)
    before = made.core.stats().step_seconds[-1]
    time.sleep(2.0)
    made.generate(["fox"], max_tokens=2)
    assert made.core.stats().step_seconds[-1] - before < 1.0


def test_every_stage_of_the_start_is_told() -> None:
    told: list[tuple[str, float, float, str]] = []

    def note_progress(what: str, done: float, total: float, note: str = "") -> None:
        told.append((what, done, total, note))

    options = {"num_gpu_blocks_override": None, "gpu_memory_utilization": 0.3, "max_model_len": 256}
    made = engine(on_progress=note_progress, **options)
    device = runner_of(made)._device
    assert isinstance(device, GpuDevice)
    graphs, prompts = device._graphs, device._prompt_graphs
    assert graphs is not None and prompts is not None
    number = len(graphs.sizes) + len(prompts.sizes)
    stages = list(dict.fromkeys(what for what, *_ in told))
    assert stages == ["Loading weights", "Measuring memory", "Capturing CUDA graphs", "Warming up"]
    for stage in stages:
        parts = [(done, total) for what, done, total, _ in told if what == stage]
        assert parts == sorted(parts) and parts[-1][0] == parts[-1][1], stage
    captured = [each for each in told if each[0] == "Capturing CUDA graphs"]
    assert [(done, total) for _, done, total, _ in captured] == [(i, number) for i in range(number + 1)]
    notes = {what: note for what, _, _, note in told}
    assert re.fullmatch(rf"Captured {number} graphs in \d+\.\d s, -?\d+\.\d GB", captured[-1][3])
    assert notes["Measuring memory"].startswith("weights ")
    assert notes["Measuring memory"].endswith(f"has room for {made.config.num_blocks * 16:,} tokens")
    assert re.fullmatch(r"Warmed up in \d+\.\d s", notes["Warming up"])
