"""--batch-invariant: the same greedy request gives the same tokens and the same bits of log probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_tools import drain, make_engine, make_prompts, make_request, variant_folder
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.ops.cpu import calibration
from microvllm.ops.cpu.tuning import Tuning
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError

# Some longer than a chunk of attention's, one with the beginning of another.
PROMPTS = make_prompts(6, TOKENIZER_SIZE, longest=150)
PROMPTS.append(PROMPTS[-1][:100] + PROMPTS[-2][:20])
TOKENS = 12
SIZES = {"hidden_size": 288, "intermediate_size": 320}

Answer = list[tuple[int, list[int], list[float], int]]


def answers(engine: InferenceEngine, ids: list[int]) -> dict[int, Answer]:
    """Of these prompts, generated together: each token, its log probability and those of three others."""
    found: dict[int, Answer] = {i: [] for i in ids}
    for i in ids:
        assert engine.core.add(make_request(i, PROMPTS[i], TOKENS, logprobs=3)) is None
    for output in drain(engine):
        assert output.error is None and output.logprobs is not None
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            found[output.request_id].append((token, entry.token_ids, entry.logprobs, entry.rank))
    return found


@pytest.fixture(
    scope="module",
    params=["float32", "bfloat16", "float16 stored", "window", "gemma3", "Q4_1", "Q8_0", "int8"],
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A model and what it is loaded with."""
    folder = tmp_path_factory.mktemp("models")
    if request.param == "window":
        return variant_folder("mistral-window"), {"dtype": "bfloat16"}
    if request.param == "gemma3":  # whose activation and norms around branches are torch's
        return variant_folder("gemma3"), {"dtype": "bfloat16"}
    if request.param == "float16 stored":
        return make_hf_folder(folder, "qwen3", dtype="float16"), {}
    hf = make_hf_folder(folder / "hf", "llama", tie=True, **SIZES)
    if request.param in ("float32", "bfloat16"):
        return hf, {"dtype": request.param}
    kind, rounds_x = ("Q4_1", "int8") if request.param == "int8" else (request.param, "float32")
    file = write_gguf(folder / "model.gguf", hf, quantization=kind)
    return file, {"dtype": "bfloat16", "cpu_activations": rounds_x}


def test_a_request_gets_the_same_bits_however_it_is_run(
    model: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, loaded = model

    def engine(**options: Any) -> InferenceEngine:
        return make_engine(path, attention_backend="cpu", batch_invariant=True, **loaded, **options)

    everyone = list(range(len(PROMPTS)))
    first = engine()
    alone = {i: answers(first, [i])[i] for i in everyone}
    assert answers(first, everyone) == alone, "together, and on the cached blocks of prompts"
    assert answers(first, everyone[::-2]) == {i: alone[i] for i in everyone[::-2]}
    assert first.core.stats().prefix_hits > 0
    for size in (1, 5, 16, 23, 90):
        assert answers(engine(long_prefill_token_threshold=size), everyone) == alone, f"in chunks of {size}"
    assert (
        answers(engine(enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=4), everyone)
        == alone
    )
    tight = engine(num_gpu_blocks_override=24, max_model_len=256, enable_prefix_caching=False)
    assert answers(tight, everyone) == alone
    assert tight.core.stats().preemptions > 0
    # After a restart on which another calibration came out.
    measured = calibration.Calibration("", Tuning(True, 0, 1, 1), {})
    monkeypatch.setattr(calibration, "calibrated", lambda library: measured)
    assert answers(engine(), everyone) == alone


def test_sixty_four_at_once_and_a_stream() -> None:
    engine = make_engine(
        variant_folder("llama-tied"), attention_backend="cpu", batch_invariant=True, dtype="bfloat16"
    )
    prompts = [f"{i} is a number" for i in range(64)]
    together = engine.generate(prompts, max_tokens=8, temperature=0.0)
    for prompt in prompts[::9]:
        assert engine.generate(prompt, max_tokens=8, temperature=0.0)[prompt] == together[prompt]
        stream = engine.stream_generate(prompt, max_tokens=8, temperature=0.0)
        assert "".join(text for _, text in stream) == together[prompt]


# ---- the option -------------------------------------------------------------------------------------


def invariant(**options: Any) -> bool:
    args = EngineArgs(model=str(variant_folder("llama-tied")), **{"device": "cpu", **options})
    return args.resolve().batch_invariant


def test_the_option_and_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not invariant()
    assert invariant(batch_invariant=True)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert invariant()
    with pytest.raises(ConfigError, match=r"VLLM_BATCH_INVARIANT=1.*only --attention-backend cpu"):
        invariant(attention_backend="torch")
    with pytest.raises(ConfigError, match=r"--batch-invariant .*only --attention-backend cpu"):
        invariant(batch_invariant=True, attention_backend="torch")


def test_on_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.runtime.config.choose_device", lambda wish: "cuda")
    with pytest.raises(ConfigError, match=r"--batch-invariant .*not there on CUDA yet"):
        invariant(batch_invariant=True)


def test_a_soft_cap_on_attention_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--batch-invariant: there is no kernel for attention with a soft cap"
    ):
        make_engine(variant_folder("gemma2"), attention_backend="cpu", batch_invariant=True)
