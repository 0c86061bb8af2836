"""The whole engine on a GPU: graphs, asynchronous scheduling and backends change no token."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from model_tools import (
    VARIANTS,
    drain,
    generate_ids,
    load_script,
    make_engine,
    make_prompts,
    make_request,
    recorded_logits,
    relative_error,
    variant_folder,
)
from mxfp4_folder import to_mxfp4
from tiny_models import make_hf_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.device import GpuDevice
from microvllm.runtime.worker.model_runner import ModelGraphRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MODELS = ("llama-tied", "qwen2", "qwen3", "qwen3-moe", "qwen3.5")
VOCAB = 300


@functools.cache
def engine(model: str, **options: Any) -> InferenceEngine:
    defaults = {"device": "cuda", "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    return make_engine(variant_folder(model), **{**defaults, **options})


def runner_of(made: InferenceEngine) -> ModelGraphRunner:
    runner = made.core._runner
    assert isinstance(runner, ModelGraphRunner)
    return runner


# Their layers are those of the models above but for rotations, norms, temperatures, routings and latents.
MORE_MODELS = (
    *("phi4-mini", "smollm3", "granite", "granite4", "seed-oss", "glm4", "olmo3", "ministral3"),
    *("glm4-moe", "minimax-m2", "ernie-moe", "olmoe", "deepseek-v3", "glm4-moe-lite"),
    *("lfm2", "lfm2-moe", "nemotron-h", "nemotron-h-moe", "granite4-mamba"),
)
PROMPTS = make_prompts(12, VOCAB, seed=1)


# Two logits as near as that may change places with the order of their sums in float32: those of the models
# here are up to 20, whose last bit is 2e-6, and plain float32 is up to 2e-5 from float64 at their nearest
# second tokens.
CLOSE_CALL = 1e-4


@functools.cache
def greedy(model: str) -> tuple[list[list[int]], list[list[float]]]:
    """On the CPU: the tokens behind each prompt, and by how much each is likelier than the second one."""
    made = make_engine(
        variant_folder(model), device="cpu", attention_backend="torch", max_num_seqs=16, max_logprobs=2
    )
    outputs = run(made, [make_request(i, prompt, 40, logprobs=2) for i, prompt in enumerate(PROMPTS)])
    entries = [[entry.logprobs for output in each for entry in output.logprobs] for each in outputs]
    tokens = [[token for output in each for token in output.token_ids] for each in outputs]
    return tokens, [[first - second for _, first, second in each] for each in entries]


def on_the_cpu(model: str) -> list[list[int]]:
    return greedy(model)[0]


def assert_tokens_of_the_cpu(found: list[list[int]], model: str) -> None:
    """Up to a close call, which may go either way."""
    for prompt, (tokens, expected, margins) in enumerate(zip(found, *greedy(model), strict=True)):
        assert len(tokens) == len(expected) == len(margins)
        first = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
        if first is not None:
            assert margins[first] < CLOSE_CALL, f"prompt {prompt}, token {first}: {tokens}, not {expected}"


@pytest.mark.parametrize("model", MORE_MODELS)
def test_greedy_tokens_of_more_families_are_those_of_the_cpu(model: str) -> None:
    made = engine(model, dtype="float32", max_num_batched_tokens=40)
    for _ in range(2):  # the second time with what is in the prefix cache
        assert_tokens_of_the_cpu(generate_ids(made, PROMPTS, 40), model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 24},
        {"num_gpu_blocks_override": 24, "max_model_len": 128},
        {"enable_prefix_caching": False},
    ],
    ids=["graphs", "eager", "sync", "chunked", "preempted", "no-prefix"],
)
def test_greedy_tokens_in_float32_are_those_of_the_cpu(model: str, options: dict[str, Any]) -> None:
    made = engine(model, dtype="float32", **options)
    for _ in range(2):  # the second time with what is in the prefix cache
        assert_tokens_of_the_cpu(generate_ids(made, PROMPTS, 40), model)
    if "num_gpu_blocks_override" in options:
        assert made.core.stats().preemptions > 0
    device = runner_of(made)._device
    assert isinstance(device, GpuDevice)
    graphs = device._graphs
    assert (graphs is None) == bool(options.get("enforce_eager")) and (graphs is None or graphs.replays > 0)


@pytest.mark.parametrize("model", MODELS)
def test_tokens_with_a_cache_of_e4m3_are_those_of_the_torch_backend(model: str) -> None:
    """In graphs and without, in chunks, after preemption and from the prefix cache."""
    fp8 = {"kv_cache_dtype": "fp8"}
    cpu = make_engine(variant_folder(model), device="cpu", attention_backend="torch", max_num_seqs=16, **fp8)
    expected = generate_ids(cpu, PROMPTS, 40)
    assert expected != on_the_cpu(model)
    for options in (
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 24},
        {"num_gpu_blocks_override": 24, "max_model_len": 128},
    ):
        made = engine(model, dtype="float32", **fp8, **options)
        for _ in range(2):
            tokens = generate_ids(made, PROMPTS, 40)
            # A key between two numbers of e4m3 may be rounded to another one than on the CPU.
            assert sum(a != b for a, b in zip(tokens, expected, strict=True)) <= 1, options
    sixteen = generate_ids(engine(model, dtype="bfloat16", **fp8), PROMPTS, 40)
    assert all(len(tokens) == 40 for tokens in sixteen)


@pytest.mark.parametrize(
    "model",
    [
        *("gemma3", "gemma4", "gemma4-shared", "gemma4-moe", "phi3-window", "qwen3-mixed-windows"),
        *("mixtral", "qwen2-moe", "qwen3-moe-mixed", "gpt-oss"),
    ],
)
def test_windows_and_layers_of_other_makes_give_the_tokens_of_the_cpu(model: str) -> None:
    assert_tokens_of_the_cpu(generate_ids(engine(model, dtype="float32"), PROMPTS, 40), model)


@pytest.mark.parametrize("form", ["fp8", "fp8-block"])
def test_experts_in_fp8_give_the_tokens_of_the_dequantised_ones(tmp_path: Path, form: str) -> None:
    """On the GPU the matrices stay in codes; in float32 nothing else is rounded."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 7, "num_experts_per_tok": 3}
    folder = make_hf_folder(tmp_path / "hf", "qwen3_moe", **sizes)
    load_script("quantize_checkpoint").quantize_folder(folder, tmp_path / "fp8", form, 128)
    options = {"dtype": "float32", "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    made = make_engine(tmp_path / "fp8", device="cuda", **options)
    cpu = make_engine(tmp_path / "fp8", device="cpu", attention_backend="torch", **options)
    assert generate_ids(made, PROMPTS, 40) == generate_ids(cpu, PROMPTS, 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_in_mxfp4_give_the_tokens_of_the_dequantised_ones(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In graphs and without; in float32 those of the CPU, and in bfloat16 logits near those of the values.

    They may be the same to the last bit: bfloat16 has every number of MXFP4, and both sum up in float32.
    """
    sizes = {"hidden_size": 320, "intermediate_size": 160, "num_local_experts": 5, "num_experts_per_tok": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    folder = make_hf_folder(tmp_path, "gpt_oss", **sizes, **heads, sliding_window=19)
    to_mxfp4(folder)
    options = {"dtype": dtype, "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    graphs = make_engine(folder, device="cuda", **options)
    eager = make_engine(folder, device="cuda", enforce_eager=True, **options)
    tokens = generate_ids(graphs, PROMPTS, 40)
    if dtype == "float32":
        cpu = make_engine(folder, device="cpu", attention_backend="torch", **options)
        assert tokens == generate_ids(eager, PROMPTS, 40) == generate_ids(cpu, PROMPTS, 40)
        return
    assert "become bfloat16" not in caplog.text, "the experts of both engines stayed in codes"
    monkeypatch.setenv("MICROVLLM_GPU_OFF", "packed")
    values = make_engine(folder, device="cuda", enforce_eager=True, **options)
    assert "weights in mxfp4 become bfloat16" in caplog.text, "and those of the third did not"
    found = []
    for made in (eager, values):
        with recorded_logits(made, every_position=True) as logits:
            generate_ids(made, PROMPTS[-1:], 1)
        found.append(torch.stack([logits[position] for position in sorted(logits)]))
    assert relative_error(*found) < 0.03


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_and_async_scheduling_change_no_token(model: str, dtype: str) -> None:
    """At the same batch shape: the padding of a graph is one, so a batch of a captured size is taken."""
    prompts = [prompt[:20] + [7] * (20 - len(prompt[:20])) for prompt in PROMPTS[:8]]
    tokens = [
        generate_ids(engine(model, dtype=dtype, **options), prompts, 40)
        for options in ({}, {"enforce_eager": True}, {"async_scheduling": False})
    ]
    assert tokens[0] == tokens[1] == tokens[2]


# Behind the gated delta rule an output is normalised. In heads of 8 the product of a token's own query and
# key, which is most of it, is often almost 0, and the norm makes what rounding has left of it large: rounding
# the weights of "qwen3.5" to float16, and nothing else, moves its log probabilities by 1.2 % of the largest,
# and computing in float16 in plain torch, with weights that differ by half a last bit, by 0.8 to 3.8 %. With
# heads half as wide as those of real models the weights cost 0.13 %, and transformers in float16 is off by
# 0.19 %: as in a dense model.
WIDE_HEADS = {"linear_key_head_dim": 64, "linear_value_head_dim": 48}


@functools.cache
def well_conditioned(model: str) -> Path:
    """The folder of a model whose log probabilities depend on rounding no more than a dense model's."""
    if model != "qwen3.5":
        return variant_folder(model)
    options = {**VARIANTS[model], **WIDE_HEADS}
    return make_hf_folder(Path(_models().name) / model, options.pop("family"), **options)


@functools.cache
def _models() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="microvllm-wide-")  # deleted at exit


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 4e-2), ("float16", 5e-3)])
def test_log_probabilities_are_near_the_cpu_s(model: str, dtype: str, tolerance: float) -> None:
    """Of a prompt, and of the 40 tokens behind it."""
    folder, found = well_conditioned(model), []
    sizes = {"max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16, "max_logprobs": -1}
    cpu = make_engine(folder, device="cpu", attention_backend="torch", **sizes)
    text = [*PROMPTS[5], *generate_ids(cpu, PROMPTS[5:6], 40)[0]]
    for made in (cpu, make_engine(folder, device="cuda", dtype=dtype, **sizes)):
        wish = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, ignore_eos=True)
        outputs = run(made, [made.processor.requests(text, wish)[0]])[0]
        entries = outputs[0].prompt_logprobs
        assert entries is not None
        rows = torch.zeros(len(entries), made.config.spec.vocab_size)
        for row, entry in zip(rows, entries, strict=True):
            row[entry.token_ids] = torch.tensor(entry.logprobs)
        found.append(rows)
    errors = (found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)
    worst = [(int(row), float(errors[row])) for row in errors.argsort(descending=True)[:6]]
    if "moe" not in model:
        assert relative_error(found[1], found[0]) < tolerance, worst
        return
    # Where two experts are as good as each other, rounding chooses: that token has another expert's output.
    assert errors.quantile(0.9) < tolerance and errors.max() < 0.2, worst


def run(made: InferenceEngine, requests: Sequence[EngineRequest]) -> list[list[Any]]:
    outputs: dict[int, list[Any]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert made.core.add(request) is None
    for output in drain(made):
        outputs[output.request_id].append(output)
    return list(outputs.values())


def test_rules_and_log_probabilities_are_those_of_the_cpu() -> None:
    """Greedy with every kind of rule, some rows with and some without, graphs on."""
    made = engine("llama-tied", dtype="float32")
    cpu = make_engine(variant_folder("llama-tied"), device="cpu", attention_backend="torch", max_num_seqs=16)
    rules: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.3},
        {"logit_bias": {5: 4.0, 9: -100.0}, "logprobs": 3},
        {"allowed_token_ids": list(range(20, 90)), "prompt_logprobs": 1},
        {"min_tokens": 9, "stop_token_ids": list(range(100, 200)), "logprobs": 1},
        {},
    ]
    results = []
    for each in (cpu, made):
        requests = []
        for i, rule in enumerate(rules):
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, **rule})
            (request,) = each.processor.requests(PROMPTS[i + 4], params)
            bad = [on_the_cpu("llama-tied")[i + 4][:2], on_the_cpu("llama-tied")[i + 4][3:6]] if i < 2 else []
            requests.append(msgspec.structs.replace(request, bad_word_ids=bad))
        results.append(run(each, requests))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
        assert [o.finish_reason for o in ours] == [o.finish_reason for o in theirs]
        for one, other in zip(ours, theirs, strict=True):
            for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert a.token_ids == b.token_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"num_gpu_blocks_override": 24}])
def test_penalties_and_biases_within_graphs_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    """Some rows have none; requests come and go while others run, and with few blocks are preempted."""
    from microvllm.ops.gpu.levers import Levers  # here, as a machine without a GPU need not have Triton

    rules: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.3},
        {"logit_bias": {5: 4.0, 9: -100.0, 17: 3.0}},
        {},
        {"repetition_penalty": 1.1, "max_tokens": 12},
        {"frequency_penalty": 0.9, "logit_bias": {3: 2.0}, "min_tokens": 8, "stop_token_ids": [5, 6]},
    ]
    if options.get("num_gpu_blocks_override"):
        options = {**options, "max_model_len": 128}
    defaults = {"max_num_seqs": 16, "num_gpu_blocks_override": 512, "max_num_batched_tokens": 2048}
    made = make_engine(
        variant_folder("llama-tied"),
        device="cuda",
        dtype="float32",
        **{**defaults, "block_size": 16, **options},
    )
    cpu = make_engine(variant_folder("llama-tied"), device="cpu", attention_backend="torch", max_num_seqs=16)
    results = []
    for each in (cpu, made):
        requests = []
        for i, rule in enumerate(rules * 2):
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **rule})
            requests.append(each.processor.requests(PROMPTS[i], params)[0])
        results.append(run(each, requests))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    device = runner_of(made)._device
    assert isinstance(device, GpuDevice)
    if Levers.of(torch.device("cuda")).rules:
        assert device._graphs is not None
        assert device.sampler.rules._graphs.keys() == set(device._graphs.sizes)


def test_seeded_draws_do_not_depend_on_company() -> None:
    made = engine("llama-tied", dtype="float32")
    wishes = [{"seed": 5}, {"seed": 6, "top_p": 0.8}, {"seed": 7, "top_k": 9}, {"seed": 8, "min_p": 0.1}]

    def ask(wish: dict[str, Any]) -> EngineRequest:
        params = SamplingParams(temperature=0.9, max_tokens=25, ignore_eos=True, **wish)
        return made.processor.requests(PROMPTS[7], params)[0]

    alone = [run(made, [ask(wish)])[0] for wish in wishes]
    together = run(made, [ask(wish) for wish in [*wishes, {"seed": 9}]])
    for one, other in zip(alone, together, strict=False):
        assert [o.token_ids for o in one] == [o.token_ids for o in other]
    assert len({str([o.token_ids for o in each]) for each in together}) == 5


def test_aborts_under_load_leave_the_pool_whole() -> None:
    made = engine("qwen3", dtype="bfloat16")
    for round_number in range(3):
        requests = [
            made.processor.requests(prompt, SamplingParams(max_tokens=30, ignore_eos=True))[0]
            for prompt in PROMPTS
        ]
        for request in requests:
            made.core.add(request)
        for step in range(12):
            made.core.step()
            made.core.abort(requests[(step + round_number) % len(requests)].request_id)
        for _ in drain(made):
            pass


def test_the_families_that_are_tested() -> None:
    assert set(MODELS) <= set(VARIANTS)
