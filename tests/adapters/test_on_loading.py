"""`--quantization fp8` of a plain checkpoint: what the matrices become as they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts
from safetensors.torch import load_file, save_file
from test_quantized_folders import FUSED
from tiny_models import make_hf_folder, reference

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.quantization import ON_LOADING
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


# ---- --quantization-config -------------------------------------------------------------------------


def load_by(
    folder: Path, config: dict[str, Any] | None, requested: str | None = None
) -> dict[str, torch.Tensor]:
    args = EngineArgs(model=str(folder), quantization=requested, quantization_config=config, device="cpu")
    return load_weights(folder, args.resolve().spec, "auto", torch.float32, packed=(ScaledTensor,))


def quantised(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """The block of each quantised matrix."""
    return {name: tensor.block for name, tensor in weights.items() if isinstance(tensor, ScaledTensor)}


@pytest.mark.parametrize(
    ("config", "requested", "same_as"),
    [
        ({"linear": "fp8_per_channel"}, None, "fp8_per_channel"),
        ({"linear": {"weight": "fp8_per_block_static", "activation": None}}, "online", "fp8_per_block"),
        ({"linear": "fp8_per_tensor_static", "moe": None}, "fp8_per_channel", "fp8_per_tensor"),
        ({"moe": "fp8_per_channel"}, "fp8_per_tensor", "fp8_per_tensor"),
        ({"ignore": ["model.layers", "lm_head", "re:visual"]}, "fp8", "fp8"),  # names are whole ones
        ({"targets": {"re:.*": "fp8_per_channel"}}, "online", "fp8_per_channel"),
    ],
)
def test_all_matrices_by_a_configuration(
    plain: Path, config: dict[str, Any], requested: str | None, same_as: str
) -> None:
    expected, found = load(plain, same_as, (ScaledTensor,)), load_by(plain, config, requested)
    assert quantised(found) == quantised(expected) != {}
    for name, tensor in expected.items():
        if isinstance(tensor, ScaledTensor):
            other = found[name]
            assert isinstance(other, ScaledTensor)
            assert other.dequantized(torch.float32).equal(tensor.dequantized(torch.float32))


def test_some_matrices_by_a_configuration(plain: Path) -> None:
    """Patterns are vLLM's: a name, an expression, or one of the shell."""
    ignore = ["model.layers.0.self_attn.o_proj", "re:.*mlp", "*.q_proj", "*.[kv]_proj"]
    found = quantised(load_by(plain, {"linear": "fp8_per_tensor", "ignore": ignore}))
    assert set(found) == {"layers.1.o"}
    targets = {"re:.*down_proj$": "fp8_per_channel", "model.layers.1.self_attn.o_proj": "fp8_per_block"}
    found = quantised(load_by(plain, {"targets": targets}))
    assert set(found) == {"layers.0.down", "layers.1.down", "layers.1.o"}
    assert found["layers.1.o"] != found["layers.1.down"]


def test_experts_by_a_configuration(tmp_path: Path) -> None:
    """Their format is that of `moe`, or of a target that names the module of them all."""
    folder = make_hf_folder(
        tmp_path / "moe", "qwen3_moe", num_hidden_layers=2, num_experts=3, num_experts_per_tok=2
    )
    found = quantised(load_by(folder, {"moe": "fp8_per_channel"}))
    assert found and all("expert" in name for name in found)
    experts = set(found)
    assert not experts & set(quantised(load_by(folder, {"linear": "fp8_per_channel"})))
    targets = {"*.0.mlp.experts": "fp8_per_channel", "re:.*self_attn": "fp8_per_tensor"}
    found = quantised(load_by(folder, {"targets": targets}))
    assert {name for name in found if "expert" in name} == {n for n in experts if n.startswith("layers.0.")}
    ignored = load_by(folder, {"ignore": ["model.layers.1.mlp.experts"]}, "fp8")
    assert {name for name in quantised(ignored) if "expert" in name} == {
        name for name in experts if name.startswith("layers.0.")
    }


@pytest.mark.parametrize(
    ("config", "requested", "fault"),
    [
        ({}, None, "needs linear, moe or targets"),
        ({"ignore": ["a"]}, None, "needs linear, moe or targets"),
        (None, "online", "--quantization online needs --quantization-config"),
        ({"kv": "fp8"}, None, "kv is unknown"),
        ({"linear": "mxfp8"}, None, "linear 'mxfp8' is not implemented"),
        ({"linear": "int8_per_channel_weight_only"}, None, "linear 'int8_per_channel_weight_only'"),
        ({"moe": {"weight": "nvfp4_per_token"}}, None, "moe.weight 'nvfp4_per_token' is not implemented"),
        ({"linear": 8}, None, "linear 8 is not implemented"),
        ({"linear": {"weights": "fp8"}}, None, "linear.weights is unknown"),
        ({"linear": {"weight": "fp8_per_tensor_static", "activation": "mxfp4"}}, None, "linear.activation"),
        ({"linear": "fp8_per_tensor", "ignore": "lm_head"}, None, "ignore must be a list of names"),
        ({"linear": "fp8_per_tensor", "ignore": ["re:("]}, None, "'re:(' is no expression"),
        ({"linear": "fp8_per_tensor", "targets": {"a": "fp8_per_tensor"}}, None, "targets does not go"),
        ({"targets": {"a": "fp8_per_tensor"}}, "fp8", "targets does not go together with --quantization fp8"),
        ({"targets": {"a": "fp8_per_tensor"}, "ignore": ["b"]}, None, "ignore has no meaning"),
        ({"targets": {"a": "mxfp4"}}, None, "targets[a] 'mxfp4' is not implemented"),
        ({"targets": []}, None, "targets must be an object"),
        ({"targets": {"re:.*_proj": "fp8_per_tensor"}}, "awq", "does not fit --quantization awq"),
    ],
)
def test_what_a_configuration_cannot_say(
    plain: Path, config: dict[str, Any] | None, requested: str | None, fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_by(plain, config, requested)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"targets": {"re:.*q_proj": "fp8_per_tensor"}}, "are one product, which has one format"),
        ({"targets": {"re:.*o_proj": "fp8_per_tensor", "*.0.*": "fp8_per_tensor"}}, "by several targets"),
        ({"targets": {"re:.*o_proj": "fp8_per_tensor", "o_proj": "fp8_per_tensor"}}, "name no matrix"),
        ({"linear": "fp8_per_tensor", "ignore": ["*"]}, "no matrix is left"),
        ({"moe": "fp8_per_tensor"}, "no matrix is left"),
    ],
)
def test_what_fits_no_matrix_of_a_model(plain: Path, config: dict[str, Any], fault: str) -> None:
    with pytest.raises(ModelFileError, match=fault):
        load_by(plain, config)
