"""Every family computes what transformers computes, and the engine's ways of batching change nothing.

All in float32 on the same weights. Greedy tokens may differ only where transformers' own best two logits are
nearer to each other than rounding can tell apart (`NEAR_TIE`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from model_tools import (
    BACKENDS,
    VARIANTS,
    generate_ids,
    groups_of,
    load_script,
    make_engine,
    make_prompts,
    make_request,
    recorded_logits,
    relative_error,
    run_requests,
    variant_folder,
)
from tiny_models import QUANTIZABLE, TOKENIZER_SIZE, make_hf_folder, reference, write_gguf

from microvllm.runtime.options.find_model import DEMO_MODEL, find_model

LOGITS_TOLERANCE = 1e-4  # max |a - b| / max |b|
NEAR_TIE = 1e-3
DATA = Path(__file__).parent.parent / "data" / "smollm2_greedy.json"


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab]: what transformers predicts after each token."""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def reference_batches(model: Any, sequences: list[list[int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, [len, vocab]) of each: eight at a time of similar lengths, filled up behind their ends."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), 8):
        chosen = order[start : start + 8]
        longest = len(sequences[chosen[-1]])
        rows = [sequences[index] + [0] * (longest - len(sequences[index])) for index in chosen]
        with torch.inference_mode():
            logits = model(torch.tensor(rows)).logits
        yield from ((index, logits[i, : len(sequences[index])]) for i, index in enumerate(chosen))


def is_greedy(prompt: list[int], tokens: list[int], logits: torch.Tensor) -> bool:
    """Whether `tokens` are the argmax of `logits`, those after `prompt + tokens`."""
    return bool(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens)


def assert_greedy(prompt: list[int], tokens: list[int], logits: torch.Tensor, label: str) -> int:
    """`tokens` are the argmax of `logits`, those of transformers after `prompt + tokens`.

    Comparing along our own tokens checks every position, also those after a near tie. Returns the number of
    near ties that went the other way.
    """
    ties = 0
    for index, token in enumerate(tokens):
        row = logits[len(prompt) - 1 + index]
        best = int(row.argmax())
        if token == best:
            continue
        margin = float(row[best] - row[token])
        print(f"{label}: token {index} is {token}, transformers' is {best} by a margin of {margin:.2e}")
        assert margin < NEAR_TIE, f"{label}: token {index} is {token} instead of {best} (margin {margin:.4f})"
        ties += 1
    return ties


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_and_logits_are_those_of_transformers(name: str) -> None:
    """24 tokens after each of 64 prompts together, then the logits of a prompt and of decode steps.

    Plain torch, which takes three times as long, generates after every sixteenth prompt, the longest too.
    """
    folder = variant_folder(name)
    model = reference(folder)
    prompts = make_prompts(64, TOKENIZER_SIZE, longest=90)
    compared: list[list[int]] = []
    for backend, chosen in zip(BACKENDS, (prompts, prompts[15::16]), strict=True):
        engine = make_engine(folder, num_gpu_blocks_override=512, attention_backend=backend)
        outputs = generate_ids(engine, chosen, 24)
        if outputs == compared[15::16]:
            continue  # the usual case: what follows was just found true of the very same tokens
        ties = 0
        assert {len(tokens) for tokens in outputs} == {24}
        sequences = [prompt + tokens for prompt, tokens in zip(chosen, outputs, strict=True)]
        for number, batched in reference_batches(model, sequences):
            prompt, tokens = chosen[number], outputs[number]
            if not is_greedy(prompt, tokens, batched):  # a near tie, or a rope that depends on the longest
                logits = reference_logits(model, prompt + tokens)
                ties += assert_greedy(prompt, tokens, logits, f"{name} on {backend}, prompt {number}")
        assert ties <= 4
        assert 4 * len({tuple(tokens) for tokens in outputs}) > 3 * len(outputs), "it says always the same"
        compared = outputs

    for backend in BACKENDS:
        engine = make_engine(folder, enable_prefix_caching=False, attention_backend=backend)
        for prompt in (prompts[5], prompts[-1]):
            with recorded_logits(engine, every_position=True) as ours:
                (tokens,) = generate_ids(engine, [prompt], 6)
            theirs = reference_logits(model, prompt + tokens)
            assert sorted(ours) == list(range(len(prompt) + 5))
            for position, row in ours.items():
                error = relative_error(row, theirs[position])
                assert error < LOGITS_TOLERANCE, f"position {position} on {backend}"


def test_the_window_of_the_window_model_matters() -> None:
    """Without its window the same weights give other logits: the comparison above did test it."""
    folder = variant_folder("mistral-window")
    model = reference(folder)
    prompt = make_prompts(1, TOKENIZER_SIZE, longest=1)[0] * 50
    prompt = [(token + 7 * i) % TOKENIZER_SIZE for i, token in enumerate(prompt)]
    seen = reference_logits(model, prompt)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    wide = reference_logits(model, prompt)
    assert relative_error(wide[10], seen[10]) < 1e-6
    assert relative_error(wide[-1], seen[-1]) > 0.01


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_tokens_of_its_folder(tmp_path: Path, family: str) -> None:
    folder = make_hf_folder(tmp_path / "hf", family, **QUANTIZABLE)
    file = write_gguf(tmp_path / "model.gguf", folder)
    prompts = make_prompts(6, TOKENIZER_SIZE)
    assert generate_ids(make_engine(file), prompts) == generate_ids(make_engine(folder), prompts)


GGUF_SIZES = {**QUANTIZABLE, "num_hidden_layers": 4}
MORE_GGUF: dict[str, dict[str, Any]] = {
    "smollm3": {"tie": True},
    "granite": {key: value for key, value in VARIANTS["granite"].items() if key != "family"},
    "seed_oss": {"attention_bias": True},
    "glm4": {"head_dim": 24, "attention_bias": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "routed_scaling_factor": 1.7,
    },
}


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", MORE_GGUF)
def test_gguf_files_of_more_families(tmp_path: Path, family: str, quantization: str) -> None:
    """The tokens of the folder; in blocks, those of the values that these stand for."""
    folder = make_hf_folder(tmp_path / "hf", family, **{**GGUF_SIZES, **MORE_GGUF[family]})
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=quantization)
    prompts = make_prompts(6, TOKENIZER_SIZE)
    if quantization == "F32":
        assert generate_ids(make_engine(file), prompts) == generate_ids(make_engine(folder), prompts)
        return
    kept, widened = (
        make_engine(file, gguf_weights=weights, attention_backend="cpu")
        for weights in ("auto", "dequantized")
    )
    assert generate_ids(kept, prompts) == generate_ids(widened, prompts)


# ---- the ways of computing: none of them changes a token ------------------------------------------

EQUIVALENCE = (
    ("llama-tied", "torch"),
    ("mistral-window", "cpu"),
    ("qwen3-untied", "cpu"),
    ("qwen3-moe", "cpu"),
    ("glm4", "cpu"),
    ("deepseek-v3", "cpu"),
    ("gemma4-shared", "cpu"),
    ("gpt-oss", "cpu"),
    ("qwen3.5", "cpu"),
    ("qwen3-next", "torch"),
    ("lfm2", "cpu"),
)


TOKENS = 24  # after each prompt: with the longest of them a window, and some blocks of 16, are full


class Alone(NamedTuple):
    """A model on a backend, prompts, and the `TOKENS` after each alone, whole, without a prefix cache."""

    model: dict[str, Any]  # arguments of `make_engine`
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=EQUIVALENCE, ids="-".join)
def alone(request: pytest.FixtureRequest) -> Alone:
    variant, backend = request.param
    model = {"model": variant_folder(variant), "attention_backend": backend}
    # Plain torch takes many times as long, and its models have their other tests.
    prompts = make_prompts(12 if backend == "cpu" else 6, TOKENIZER_SIZE, seed=3)
    engine = make_engine(**model, enable_prefix_caching=False)
    return Alone(model, prompts, [generate_ids(engine, [prompt], TOKENS)[0] for prompt in prompts])


WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "async": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 13, "max_num_seqs": 12},
    "chunked-async": {"max_num_batched_tokens": 13, "max_num_seqs": 12, "async_scheduling": True},
    "chunks-of-one": {"long_prefill_token_threshold": 1},
    "whole-prompts-only": {"enable_chunked_prefill": False},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "three-rows": {"max_num_seqs": 3},
    "by-priority": {"scheduling_policy": "priority"},
    "aligned": {"scheduling_policy": "sjf"},
    "aligned-async": {
        "scheduling_policy": "sjf",
        "max_num_batched_tokens": 13,
        "max_num_seqs": 12,
        "async_scheduling": True,
    },
    "blocks-of-1": {"block_size": 1, "num_gpu_blocks_override": 2000},
    "blocks-of-8": {"block_size": 8},
    "blocks-of-256": {"block_size": 256, "num_gpu_blocks_override": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_batching_changes_a_token(alone: Alone, way: str) -> None:
    model, prompts, expected = alone
    engine = make_engine(**model, **WAYS[way])
    requests = [make_request(i, p, TOKENS, priority=-i) for i, p in enumerate(prompts)]
    assert run_requests(engine, requests) == expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preemption_changes_no_token(alone: Alone, asynchronous: bool) -> None:
    model, prompts, expected = alone
    # With a window in all layers requests stop growing after a few blocks; groups of layers that share blocks
    # need fewer of them than one alone.
    blocks, fewest = (30, 4) if len(prompts) > 6 else (22, 2)
    if model["model"] == variant_folder("mistral-window"):
        blocks, fewest = 22, 1
    if (groups := groups_of(model["model"])) > 1:
        blocks, fewest = 23 * groups, 2
    engine = make_engine(
        **model,
        max_model_len=88,
        block_size=4,
        num_gpu_blocks_override=blocks,
        async_scheduling=asynchronous,
        enable_prefix_caching=False,
    )
    assert generate_ids(engine, prompts, TOKENS) == expected
    assert engine.core.stats().preemptions >= fewest


def test_a_prefix_hit_changes_no_token(alone: Alone) -> None:
    model, prompts, expected = alone
    engine = make_engine(**model)
    for _ in range(2):
        assert generate_ids(engine, prompts, TOKENS) == expected
    hits = engine.core.stats().prefix_hits
    # Whole blocks of each prompt, but never its last token, which has to be computed for its logits.
    assert hits == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts) > 0
    if engine.core.kv.states.rows:
        return  # sequences go on from the end of a turn, not from the middle: test_hybrids.py
    # A turn later: the generated text is part of the prompt, and its blocks are there too.
    prompt, tokens = prompts[-1], expected[-1]
    generate_ids(engine, [prompt + tokens[:18]], 1)
    assert engine.core.stats().prefix_hits - hits == (len(prompt) + 17) // 16 * 16
    assert generate_ids(engine, [prompt + tokens[:18]], TOKENS - 18) == [tokens[18:]]


def test_requests_that_come_and_go_during_others(
    alone: Alone,
) -> None:
    """Prefills beside decodes, an abort in the middle, new requests on its row."""
    model, prompts, expected = alone
    engine = make_engine(**model, max_num_seqs=4, max_num_batched_tokens=24)
    tokens: dict[int, list[int]] = {}
    waiting = list(range(len(prompts)))
    for step in range(2000):
        if waiting and step % 3 == 0:
            index = waiting.pop()
            tokens[index] = []
            assert engine.core.add(make_request(index, prompts[index], TOKENS)) is None
            if index % 4 == 0:
                engine.core.add(make_request(100 + index, prompts[index] + [1], TOKENS))
        if step % 7 == 5:
            for index in range(0, 12, 4):
                engine.core.abort(100 + index)
        for output in engine.core.step():
            if output.request_id < 100:
                tokens[output.request_id] += output.token_ids
        if not waiting and not engine.core.has_work():
            break
    assert [tokens[index] for index in range(len(prompts))] == expected
    engine.core.kv.check()


# ---- bfloat16 -------------------------------------------------------------------------------------

# bfloat16 keeps 8 bits: a rounding is off by up to 2^-9 = 0.2 %, and those of all operators add up.
BFLOAT16_TOLERANCE = 0.08


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        "mistral-window",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "gemma4-shared",
        "phi3-window",
    ],
)
def test_bfloat16_is_near_float32(name: str, backend: str) -> None:
    folder = variant_folder(name)
    prompt = make_prompts(2, TOKENIZER_SIZE)[1]
    logits = {}
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(folder, dtype=dtype, attention_backend=backend)
        with recorded_logits(engine, every_position=True) as found:
            (tokens,) = generate_ids(engine, [prompt], 8)
        assert len(tokens) == 8
        logits[dtype] = torch.stack([found[position] for position in range(len(prompt))])
    error = relative_error(logits["bfloat16"], logits["float32"])
    print(f"{name} on {backend}: bfloat16 differs by {error:.4f}")
    assert 0 < error < BFLOAT16_TOLERANCE


# ---- the real model -------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_says_what_transformers_says() -> None:
    """At least 64 prompts x 64 tokens, all in one batch, against scripts/reference_tokens.py."""
    data = json.loads(DATA.read_text("utf-8"))
    path = find_model(DEMO_MODEL)
    assert data["model"] == path.name
    cases = data["cases"]
    assert len(cases) >= 64 and all(len(case["token_ids"]) == 64 for case in cases)
    engine = make_engine(path, num_gpu_blocks_override=1024)
    outputs = generate_ids(engine, [case["prompt_token_ids"] for case in cases], 64)
    for number, (case, tokens) in enumerate(zip(cases, outputs, strict=True)):
        if tokens == case["token_ids"]:
            continue
        first = next(
            i for i, pair in enumerate(zip(tokens, case["token_ids"], strict=True)) if len(set(pair)) > 1
        )
        margin = case["near_ties"].get(str(first))
        print(f"prompt {number} differs from token {first}, where transformers' margin is {margin}")
        assert margin is not None and margin < NEAR_TIE


@pytest.fixture(scope="module")
def transformers_smollm2() -> Any:
    return load_script("reference_tokens").transformers_model(find_model(DEMO_MODEL))


@pytest.mark.model
def test_smollm2_beside_transformers(transformers_smollm2: Any) -> None:
    """A few prompts live: the tokens, and the logits of every position of a long one."""
    path, model = find_model(DEMO_MODEL), transformers_smollm2
    cases = json.loads(DATA.read_text("utf-8"))["cases"]
    prompts = [case["prompt_token_ids"] for case in (cases[0], cases[34], cases[48], cases[-1])]
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    compared: list[list[int]] = []
    for backend in BACKENDS:
        engine = make_engine(path, attention_backend=backend)
        outputs = generate_ids(engine, prompts, 10)
        if outputs != compared:  # the usual case: the second backend gives what was just found true
            compared = outputs
            logits = [
                reference_logits(model, prompt + tokens)
                for prompt, tokens in zip(prompts, outputs, strict=True)
            ]
            for number, (prompt, tokens) in enumerate(zip(prompts, outputs, strict=True)):
                assert_greedy(prompt, tokens, logits[number], f"{backend}, prompt {number}")
        engine.core.reset_prefix_cache()
        with recorded_logits(engine, every_position=True) as ours:
            (tokens,) = generate_ids(engine, [prompts[longest]], 4)
        assert tokens == outputs[longest][:4]
        count = len(prompts[longest]) + 3
        error = relative_error(torch.stack([ours[i] for i in range(count)]), logits[longest][:count])
        print(f"{backend}: logits over {count} positions differ by {error:.2e}")
        assert error < LOGITS_TOLERANCE


@pytest.mark.model
@pytest.mark.parametrize("method", ["LAST", "MEAN"])
def test_vectors_of_smollm2_beside_transformers(method: str, transformers_smollm2: Any) -> None:
    """Several texts at once, the longest in pieces."""
    config = {"pooling_type": method, "use_activation": False}
    engine = make_engine(DEMO_MODEL, runner="pooling", pooler_config=config, max_num_batched_tokens=40)
    texts = ["The capital of France is Paris.", "Hello", "In the beginning was the Word. " * 12]
    sequences = [engine.vector_sequence(engine.tokenizer.encode(text)) for text in texts]
    for _ in engine.generate_deltas(sequences):
        pass
    for sequence in sequences:
        with torch.no_grad():
            ids = torch.tensor([sequence.prompt_token_ids])
            states = transformers_smollm2.model(ids).last_hidden_state[0]
        vector = torch.frombuffer(bytearray(sequence.pooled or b""), dtype=torch.float32)
        assert relative_error(vector, states[-1] if method == "LAST" else states.mean(0)) < 1e-5


@pytest.mark.model
def test_smollm2_in_bfloat16_answers() -> None:
    engine = make_engine(DEMO_MODEL, dtype="bfloat16")
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    ids = engine.processor.tokenize_prompt(engine.processor.render_text(conversation), False)
    text = engine.tokenizer.decode(generate_ids(engine, [ids], 24)[0])
    assert "Paris" in text
