"""`--quantization fp8` of a plain checkpoint: what the matrices become as they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts
from safetensors.torch import load_file, save_file
from test_quantized_folders import FUSED
from tiny_models import make_hf_folder, reference

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.quantization import ON_LOADING
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.scaled import ScaledTensor
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

quantize_checkpoint = load_script("quantize_checkpoint")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("plain"), "llama", num_hidden_layers=2)


def load(
    folder: Path, requested: str, packed: tuple[type[torch.Tensor], ...] = (), load_format: str = "auto"
) -> dict[str, torch.Tensor]:
    args = EngineArgs(model=str(folder), quantization=requested, device="cpu", load_format=load_format)
    return load_weights(folder, args.resolve().spec, load_format, torch.float32, packed=packed)


def rounded(folder: Path, requested: str) -> dict[str, torch.Tensor]:
    """What the exporter makes of each matrix of the layers, by its name in the file."""
    block = ON_LOADING[requested]
    return {
        name: quantize_checkpoint.write_fp8(tensor.float(), block, ()).values
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.ndim == 2 and ".layers." in name
    }


@pytest.mark.parametrize("requested", ON_LOADING)
def test_matrices_are_those_of_a_checkpoint_in_this_format(plain: Path, requested: str) -> None:
    """Each matrix of the file has scales of its own; embeddings and head stay as they are."""
    values, before = rounded(plain, requested), load_weights(plain, load_spec(plain), "auto", torch.float32)
    found, kept = load(plain, requested), load(plain, requested, (ScaledTensor,))
    for name, tensor in before.items():
        layer, _, slot = name.removeprefix("layers.").partition(".")
        if slot in FUSED:
            wanted = torch.cat([values[f"model.layers.{layer}.{part}.weight"] for part in FUSED[slot]])
            assert found[name].equal(wanted), name
            assert not wanted.equal(tensor)
            packed = kept[name]
            assert isinstance(packed, ScaledTensor) and packed.activations == "token"
            assert packed.dequantized(torch.float32).equal(wanted)
        else:
            assert found[name].equal(tensor) and kept[name].equal(tensor), name
            assert type(kept[name]) is torch.Tensor


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_greedy_tokens_are_those_of_the_rounded_matrices(plain: Path, backend: str) -> None:
    theirs = reference(plain)
    theirs.load_state_dict(rounded(plain, "fp8_per_channel"), strict=False)
    prompts = make_prompts(3, 320, seed=5, longest=20)
    engine = make_engine(plain, attention_backend=backend, quantization="fp8_per_channel")
    for prompt, found in zip(prompts, generate_ids(engine, prompts, 12), strict=True):
        logits = theirs(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        assert found == logits.argmax(-1).tolist()


def test_random_weights_are_rounded_too(plain: Path) -> None:
    before = load_weights(plain, load_spec(plain), "dummy", torch.float32)
    found, kept = load(plain, "fp8", (), "dummy"), load(plain, "fp8", (ScaledTensor,), "dummy")
    for name, tensor in before.items():
        if name.rpartition(".")[2] in FUSED:
            packed = kept[name]
            assert isinstance(packed, ScaledTensor) and packed.dequantized(torch.float32).equal(found[name])
            assert 0 < (found[name] - tensor).norm() < 0.04 * tensor.norm()
        else:
            assert found[name].equal(tensor) and kept[name].equal(tensor)


def test_what_is_not_finite_is_refused(plain: Path, tmp_path: Path) -> None:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelFileError,
        match=r"tensor model\.layers\.1\.self_attn\.o_proj\.weight has values that are not finite",
    ):
        load(tmp_path, "fp8")


def test_what_is_quantised_already_is_not_quantised_again(plain: Path, tmp_path: Path) -> None:
    quantize_checkpoint.quantize_folder(plain, tmp_path, "awq", 32)
    for requested, problem in (
        ("fp8_per_block", r"--quantization fp8_per_block: .* is quantised as awq"),
        ("fp8", r"--quantization fp8: .* is quantised as awq"),
    ):
        with pytest.raises(ConfigError, match=problem):
            EngineArgs(model=str(tmp_path), quantization=requested, device="cpu").resolve()
    with pytest.raises(ConfigError, match=r"--quantization gptq: .* quantises to fp8, fp8_per_tensor"):
        EngineArgs(model=str(plain), quantization="gptq", device="cpu").resolve()
