"""--batch-invariant: the same greedy request gives the same tokens and the same bits of log probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from invariance import answers, check_ways
from model_tools import make_engine, variant_folder
from tiny_models import make_hf_folder, write_gguf

from microvllm.ops.cpu import calibration
from microvllm.ops.cpu.tuning import Tuning
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError

SIZES = {"hidden_size": 288, "intermediate_size": 320}


@pytest.fixture(
    scope="module",
    params=[
        "float32",
        "bfloat16",
        "float16 stored",
        "window",
        "gemma3",
        "experts",
        "states",
        "Q4_1",
        "Q8_0",
        "int8",
    ],
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A model and what it is loaded with."""
    folder = tmp_path_factory.mktemp("models")
    if request.param == "window":
        return variant_folder("mistral-window"), {"dtype": "bfloat16"}
    if request.param == "experts":
        return variant_folder("qwen2-moe"), {"dtype": "bfloat16"}
    if request.param == "states":
        return variant_folder("qwen3.5"), {"dtype": "bfloat16"}
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

    alone = check_ways(engine)
    # After a restart on which another calibration came out.
    measured = calibration.Calibration("", Tuning(True, 0, 1, 1), {})
    monkeypatch.setattr(calibration, "calibrated", lambda library: measured)
    assert answers(engine(), list(alone)) == alone


@pytest.mark.parametrize("variant", ["gemma4-shared", "nemotron-h-moe"])
def test_what_torch_computes_of_rows_of_any_width(variant: str) -> None:
    """Inputs of layers and the scores of experts, whose widths are no multiples of torch's vectors."""

    def engine(**options: Any) -> InferenceEngine:
        path = variant_folder(variant)
        return make_engine(path, attention_backend="cpu", batch_invariant=True, dtype="bfloat16", **options)

    first, ids = engine(), [0, 2, 4]
    alone = {i: answers(first, [i])[i] for i in ids}
    assert answers(first, ids) == alone
    assert answers(engine(long_prefill_token_threshold=5), ids) == alone


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
    with pytest.raises(
        ConfigError, match=r"VLLM_BATCH_INVARIANT=1.*--attention-backend must be cpu or triton"
    ):
        invariant(attention_backend="torch")
    with pytest.raises(ConfigError, match=r"--batch-invariant .*--attention-backend must be cpu or triton"):
        invariant(batch_invariant=True, attention_backend="torch")


def test_on_a_gpu_the_own_kernels_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.runtime.config.choose_device", lambda wish: "cuda")
    assert invariant(batch_invariant=True, attention_backend="triton")


def test_a_soft_cap_on_attention_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--batch-invariant: there is no kernel for attention with a soft cap"
    ):
        make_engine(variant_folder("gemma2"), attention_backend="cpu", batch_invariant=True)
