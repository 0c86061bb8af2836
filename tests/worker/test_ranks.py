"""Ranks that hold a model together give the tokens of one, and a rank that fails ends the engine."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_tools import (
    DELTA,
    drain,
    generate_ids,
    groups_of,
    make_engine,
    make_prompts,
    make_request,
    run_requests,
)
from process_tools import PATIENCE_S, alive, wait_until
from rank_threads import ThreadedRunner
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

import microvllm.runtime.engine as engine_module
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError, EngineError
from microvllm.runtime.offline.llm import LLM
from microvllm.runtime.offline.sampling_params import SamplingParams as UserParams
from microvllm.runtime.options import rank_checks
from microvllm.runtime.process import heartbeat
from microvllm.runtime.request import SamplingParams, StructuredOutput
from microvllm.runtime.vectors import POOLING_PARAMS
from microvllm.runtime.worker.model_runner import ModelGraphRunner
from microvllm.runtime.worker.parallel import runner as runner_module
from microvllm.runtime.worker.parallel.runner import ParallelRunner
from microvllm.runtime.worker.pooling import PoolingRunner

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"family": "llama", "num_key_value_heads": 1, "tie": True},
    "mistral": {"family": "mistral", "sliding_window": 19},
    "qwen2": {"family": "qwen2", "tie": True},
    "qwen3": {"family": "qwen3", "head_dim": 48, "vocab_size": TOKENIZER_SIZE + 1},
    "gemma2": {
        "family": "gemma2",
        "tie": True,
        "sliding_window": 19,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {"family": "gemma3_text", "tie": True, "sliding_window": 19, "layer_types": LAYERS},
    "gemma4": {
        "family": "gemma4_text",
        "tie": True,
        "sliding_window": 19,
        "global_head_dim": 48,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "layer_types": LAYERS[:2],
        "num_hidden_layers": 2,
    },
    "gemma4-shared": {
        "family": "gemma4_text",
        "tie": True,
        "vocab_size": TOKENIZER_SIZE + 1,
        "vocab_size_per_layer_input": TOKENIZER_SIZE + 1,
        "sliding_window": 19,
        "global_head_dim": 48,
        "hidden_size_per_layer_input": 24,
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": [*LAYERS[:2], *LAYERS[:2]],
    },
    "gemma4-moe": {
        "family": "gemma4_text",
        "tie": True,
        "sliding_window": 19,
        "global_head_dim": 48,
        "hidden_size_per_layer_input": 0,
        "layer_types": LAYERS[:2],
        "num_hidden_layers": 2,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
    "phi3": {"family": "phi3", "sliding_window": 19},
    "glm4": {"family": "glm4"},
    "olmo3-one-kv-head": {"family": "olmo3", "num_key_value_heads": 1, "sliding_window": 19},
    "qwen3.5": {"family": "qwen3_5_text", **DELTA, "linear_num_key_heads": 2},
    "lfm2": {"family": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
    "qwen2-moe": {
        "family": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
    },
}
PROMPTS = make_prompts(10, 300, seed=1)
TIGHT = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 14, "max_model_len": 128}


def folder_of(path: Path, name: str) -> Path:
    options = {**SIZES, **FAMILIES[name]}
    return make_hf_folder(path / name, options.pop("family"), **options)


def threaded(patch: pytest.MonkeyPatch, kind: Callable[..., ModelGraphRunner] = ModelGraphRunner) -> None:
    def start(config: EngineConfig, on_progress: Any = None) -> Any:
        return ThreadedRunner(config, kind) if config.tensor_parallel_size > 1 else kind(config)

    patch.setattr(engine_module, "start_runner", start)


def both(model: Path, **options: Any) -> tuple[InferenceEngine, InferenceEngine]:
    defaults = {"max_num_seqs": 6, **options}
    return make_engine(model, **defaults), make_engine(model, tensor_parallel_size=2, **defaults)


# ---- tokens --------------------------------------------------------------------------------------


# How steps overlap is no matter of layers: in turns, and both for one with a state and for one without.
WAYS = [(name, place % 2 == 1) for place, name in enumerate(FAMILIES)]
WAYS += [(name, (name, False) in WAYS) for name in ("qwen2", "qwen3.5")]


@pytest.mark.parametrize(
    ("name", "asynchronous"), WAYS, ids=lambda value: {True: "async", False: "sync"}.get(value, value)
)
def test_tokens_of_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asynchronous: bool
) -> None:
    """Of prompts in chunks, of preempted requests, and with a prefix from the cache."""
    threaded(monkeypatch)
    folder = folder_of(tmp_path, name)
    tight = TIGHT | {"num_gpu_blocks_override": 14 * groups_of(folder)}
    one, two = both(folder, async_scheduling=asynchronous, **tight)
    for prompts in (PROMPTS, PROMPTS[-1:], PROMPTS[-1:]):
        assert generate_ids(two, prompts, 40) == generate_ids(one, prompts, 40)
    stats = two.core.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0


@pytest.mark.parametrize("packed", ["packed", "dequantized"])
def test_tokens_of_a_quantised_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str) -> None:
    threaded(monkeypatch)
    folder = make_hf_folder(tmp_path / "hf", "llama", **SIZES, intermediate_size=192)
    one, two = both(write_gguf(tmp_path / "m.gguf", folder, quantization="Q8_0"), gguf_weights=packed)
    assert generate_ids(two, PROMPTS, 20) == generate_ids(one, PROMPTS, 20)


def test_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threaded(monkeypatch, PoolingRunner)
    config = {"pooling_type": "MEAN", "use_activation": False}
    one, two = both(folder_of(tmp_path, "qwen3"), runner="pooling", pooler_config=config)
    found = []
    for engine in (one, two):
        for prompt in PROMPTS:
            engine.core.add_samples(engine.processor.requests(prompt, POOLING_PARAMS))
        found.append({output.request_id: output.pooled for output in drain(engine)})
    assert len(found[0]) == len(PROMPTS)
    for first, second in zip(found[0].values(), found[1].values(), strict=True):
        assert first is not None and second is not None and len(first) == len(second)


SAMPLED: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 0.9, "seed": 3},
    "unseeded": {"temperature": 0.9},
    "filtered": {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "rules": {"min_tokens": 5, "logit_bias": {7: 4.0}, "allowed_token_ids": list(range(100))},
    "logprobs": {"temperature": 1.0, "seed": 5, "logprobs": 3, "prompt_logprobs": 2},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InferenceEngine, InferenceEngine]]:
    """An engine, and one of two processes."""
    yield both(folder_of(tmp_path_factory.mktemp("ranks"), "qwen2"), async_scheduling=True, **TIGHT)
    gc.collect()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_of_two_processes(pair: tuple[InferenceEngine, InferenceEngine], name: str) -> None:
    def run(engine: InferenceEngine) -> tuple[list[list[int]], list[Any]]:
        requests = [make_request(i, prompt, 20, **SAMPLED[name]) for i, prompt in enumerate(PROMPTS)]
        seen: list[Any] = []
        commit = engine.core.scheduler.commit

        def noting(*args: Any) -> Any:
            outputs = commit(*args)
            seen.extend((o.request_id, o.logprobs, o.prompt_logprobs) for o in outputs)
            return outputs

        engine.core.scheduler.commit = noting  # type: ignore[method-assign]
        try:
            return run_requests(engine, requests), seen
        finally:
            engine.core.scheduler.commit = commit  # type: ignore[method-assign]

    (tokens, logprobs), (wanted, wanted_logprobs) = run(pair[1]), run(pair[0])
    assert tokens == wanted
    for (_, *ours), (_, *theirs) in zip(logprobs, wanted_logprobs, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            for a, b in zip(mine or (), other or (), strict=True):
                assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_grammar_is_followed_by_two_processes(pair: tuple[InferenceEngine, InferenceEngine]) -> None:
    form = StructuredOutput(kind="regex", spec="[a-f]{12}")
    texts = []
    for engine in pair:
        run = [
            engine.processor.requests(prompt, SamplingParams(structured_outputs=form, max_tokens=40, seed=i))
            for i, prompt in enumerate(PROMPTS[:4])
        ]
        free = [make_request(10**6 + i, prompt, 20) for i, prompt in enumerate(PROMPTS[4:8])]
        tokens: dict[int, list[int]] = {}
        for requests in run:
            engine.core.add_samples(requests)
        for request in free:
            engine.core.add(request)
        for output in drain(engine):
            assert output.error is None, output
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        texts.append([engine.tokenizer.decode(tokens[requests[0].request_id]) for requests in run])
        texts[-1] += [str(tokens[request.request_id]) for request in free]
    assert texts[0] == texts[1]
    assert all(len(text) == 12 and set(text) <= set("abcdef") for text in texts[1][:4])


def test_vllms_class_with_two_processes_and_that_they_end_with_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen3")
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 64}
    texts = []
    for more in ({}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}):
        llm = LLM(str(folder), **options, **more)
        greedy = UserParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        texts.append(
            [result.outputs[0].text for result in llm.generate(["abc", "The"], greedy, use_tqdm=False)]
        )
    assert texts[0] == texts[1]
    pid = rank_of(llm.engine).pid
    assert alive(pid)
    del llm
    gc.collect()
    wait_until(lambda: not alive(pid), "the rank has ended")


# ---- faults --------------------------------------------------------------------------------------


def rank_of(engine: InferenceEngine) -> Any:
    runner = engine.core._runner
    assert isinstance(runner, ParallelRunner)
    (rank,) = runner._processes._ranks
    return rank


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (signal.SIGKILL, r"died \(killed by signal 9\)"),
        (signal.SIGSTOP, "gave no sign of life and took no processor time"),
    ],
    ids=["killed", "frozen"],
)
def test_a_rank_that_ends_or_freezes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: str
) -> None:
    monkeypatch.setattr(heartbeat, "FROZEN_S", 3.0)
    engine = make_engine(folder_of(tmp_path, "qwen2"), tensor_parallel_size=2)
    rank, folder = rank_of(engine), Path(engine.core._runner._processes.folder)  # type: ignore[attr-defined]
    for i, prompt in enumerate(PROMPTS):
        engine.core.add(make_request(i, prompt, 400))
    for _ in range(5):
        engine.core.step()
    started = time.monotonic()
    os.kill(rank.pid, number)
    with pytest.raises(EngineError, match=rf"rank 1 \(process {rank.pid}\) {problem}"):
        for _ in range(400):
            engine.core.step()
    assert time.monotonic() - started < PATIENCE_S
    assert not alive(rank.pid) and not folder.exists()


def test_a_rank_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "stamp_of", lambda config: "another version")
    with pytest.raises(ConfigError, match=r"rank 1 \(process \d+\) differs from rank 0: code in .* is not"):
        make_engine(folder_of(tmp_path, "qwen2"), tensor_parallel_size=2)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3: 8 heads do not divide into 3 shards"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be at least 1, got 0"),
        ({"tensor_parallel_size": 2, "batch_invariant": True}, "--batch-invariant .* needs one device"),
        (
            {"distributed_executor_backend": "ray"},
            "--distributed-executor-backend must be one of mp, got ray",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EngineArgs(model=str(folder_of(tmp_path, "qwen2")), device="cpu", **options).resolve()


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["NVIDIA H200"], "--tensor-parallel-size 2: there is one GPU"),
        (["NVIDIA H200", "NVIDIA L4"], "the GPUs are of different kinds: NVIDIA H200, NVIDIA L4"),
    ],
)
def test_too_few_or_different_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], problem: str
) -> None:
    monkeypatch.setattr(rank_checks, "gpu_names", lambda: names)
    spec = EngineArgs(model=str(folder_of(tmp_path, "qwen2")), device="cpu").resolve().spec
    with pytest.raises(ConfigError, match=problem):
        rank_checks.check_ranks(2, spec, "cuda", batch_invariant=False)


def test_gpus_of_one_kind_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_checks, "gpu_names", lambda: ["NVIDIA H200"] * 2)
    spec = EngineArgs(model=str(folder_of(tmp_path, "qwen2")), device="cpu").resolve().spec
    for device in ("cpu", "cuda"):
        assert rank_checks.check_ranks(2, spec, device, batch_invariant=False) == spec.sharded(2)
