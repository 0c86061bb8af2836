"""Quantised Hugging Face folders: the loaded matrices are those that their authors' definitions give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts
from safetensors.torch import load_file, save_file
from test_shards import assert_shards_agree
from tiny_models import make_hf_folder, reference

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.coded import CodedTensor
from microvllm.ops.scaled import ScaledTensor

quantize_checkpoint = load_script("quantize_checkpoint")
FORMS = tuple(quantize_checkpoint.FORMS)
GROUP = 32  # of 144 columns the last group is shorter, and of blocks of 128 the last block
LAYER = "model.layers.1."
Q, UP, DOWN = f"{LAYER}self_attn.q_proj.", f"{LAYER}mlp.up_proj.", f"{LAYER}mlp.down_proj."
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("plain"), "llama", num_hidden_layers=2)


def quantize(source: Path, target: Path, form: str, group: int = GROUP) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = quantize_checkpoint.quantize_folder(source, target, form, group)
    return values


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard: Shard = WHOLE,
    packed: tuple[type[torch.Tensor], ...] = (),
) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_spec(folder), "auto", dtype, shard=shard, packed=packed)


def expected(values: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    return {
        f"layers.{layer}.{name}": torch.cat([values[f"model.layers.{layer}.{part}.weight"] for part in parts])
        for name, parts in FUSED.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_values_of_its_definition(plain: Path, tmp_path: Path, form: str) -> None:
    values = quantize(plain, tmp_path, form)
    assert len(values) == 2 * 7
    loaded, rounded, before = load(tmp_path), load(tmp_path, torch.bfloat16), load(plain)
    assert loaded.keys() == before.keys()
    for layer in range(2):
        for name, matrix in expected(values, layer).items():
            assert loaded[name].equal(matrix), name
            assert rounded[name].equal(matrix.bfloat16()), name
            # What this test writes is the model, and not just anything.
            assert (matrix - before[name]).norm() < 0.2 * before[name].norm()
            assert not matrix.equal(before[name])
    assert loaded["lm_head"].equal(before["lm_head"]) and loaded["embed"].equal(before["embed"])


FP8_FORMS = tuple(form for form in FORMS if "fp8" in form)


@pytest.mark.parametrize("form", FP8_FORMS)
def test_codes_that_stay_packed_stand_for_the_same_values(plain: Path, tmp_path: Path, form: str) -> None:
    values = quantize(plain, tmp_path, form)
    kept = load(tmp_path, torch.bfloat16, packed=(ScaledTensor,))
    for layer in range(2):
        for name, matrix in expected(values, layer).items():
            tensor = kept[name]
            assert isinstance(tensor, ScaledTensor) and tensor.nbytes == matrix.numel()
            assert tensor.dequantized(torch.float32).equal(matrix), name
            wanted = (
                "tensor" if any(word in form for word in ("static", "modelopt-fp8", "-tensor")) else "token"
            )
            assert tensor.activations == ("token" if "channel" in form else wanted)
            assert tensor.input_scale == (pytest.approx(0.02) if tensor.activations == "tensor" else 0.0)
    # Blocks of 128 rows that begin within another one in the fused matrix have a scale for each row.
    if form == "fp8-block":
        assert [kept[f"layers.1.{name}"].block for name in ("qkv", "down")] == [(1, 128), (128, 128)]
    assert type(kept["embed"]) is torch.Tensor and kept["embed"].dtype == torch.bfloat16


def test_a_matrix_that_is_quantised_in_part_does_not_stay_packed(plain: Path, tmp_path: Path) -> None:
    values = quantize(plain, tmp_path, "fp8")
    configure(tmp_path, ignored_layers=[Q[:-1]])
    unquantize(tmp_path, plain, (Q,))
    values[f"{Q}weight"] = load_file(plain / "model.safetensors")[f"{Q}weight"]
    kept = load(tmp_path, packed=(ScaledTensor,))
    assert type(kept["layers.1.qkv"]) is torch.Tensor
    assert kept["layers.1.qkv"].equal(expected(values, 1)["layers.1.qkv"])
    assert isinstance(kept["layers.1.o"], ScaledTensor) and isinstance(kept["layers.0.qkv"], ScaledTensor)


@pytest.mark.parametrize("form", FP8_FORMS)
def test_a_shard_of_codes_that_stay_packed(uneven: Path, tmp_path: Path, form: str) -> None:
    quantize(uneven, tmp_path, form)
    for shard in (Shard(0, 2), Shard(1, 2)):
        plain_tensors, kept = load(tmp_path, shard=shard), load(tmp_path, shard=shard, packed=(ScaledTensor,))
        for name, tensor in kept.items():
            found = tensor.dequantized(torch.float32) if isinstance(tensor, ScaledTensor) else tensor
            assert found.equal(plain_tensors[name]), name
        cut = form == "fp8-block" and shard.rank == 1  # the second half of 312 columns begins within a block
        assert isinstance(kept["layers.0.down"], ScaledTensor) != cut


@pytest.mark.parametrize("form", ["gptq-4", "gptq-8", "awq", "w4a16", "w8a16"])
def test_one_group_of_all_columns(plain: Path, tmp_path: Path, form: str) -> None:
    values = quantize(plain, tmp_path, form, group=-1)
    assert load(tmp_path)["layers.1.down"].equal(values[f"{DOWN}weight"])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Halves of its rows and columns end in the middle of a word of 32 bits, of a group and of a block."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 312}
    folder = tmp_path_factory.mktemp("uneven")
    return make_hf_folder(folder, "llama", num_hidden_layers=1, head_dim=20, tokenizer=False, **sizes)


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_has_its_cuts_of_codes_and_scales(uneven: Path, tmp_path: Path, form: str) -> None:
    quantize(uneven, tmp_path, form)
    whole, *halves = (load(tmp_path, shard=shard) for shard in (WHOLE, Shard(0, 2), Shard(1, 2)))
    for name in ("o", "down"):
        assert torch.cat([half[f"layers.0.{name}"] for half in halves], 1).equal(whole[f"layers.0.{name}"])
    pairs = [half["layers.0.gate_up"].chunk(2) for half in halves]
    assert torch.cat([pair[i] for i in range(2) for pair in pairs]).equal(whole["layers.0.gate_up"])
    sizes_of = (60, 20, 20)
    pieces = [torch.split(half["layers.0.qkv"], sizes_of) for half in halves]
    assert torch.cat([piece[i] for i in range(3) for piece in pieces]).equal(whole["layers.0.qkv"])


@pytest.mark.parametrize("form", ["fp8-block", "awq"])
def test_two_shards_give_the_logits_of_the_whole_model(tmp_path: Path, form: str) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    quantize(make_hf_folder(tmp_path / "plain", "qwen3", **sizes), tmp_path / "made", form)
    assert_shards_agree(tmp_path / "made", "cpu")


@pytest.mark.parametrize("form", ["fp8-static", "compressed-fp8-channel", "gptq-4-order", "w4a16-asymmetric"])
def test_matrices_that_are_stored_as_one(tmp_path: Path, form: str) -> None:
    """Phi-3's qkv_proj and gate_up_proj have one scale per tensor, and shards cut several runs of rows."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    folder = make_hf_folder(tmp_path / "plain", "phi3", num_hidden_layers=2, **sizes)
    values = quantize(folder, tmp_path / "made", form)
    assert load(tmp_path / "made")["layers.1.qkv"].equal(values[f"{LAYER}self_attn.qkv_proj.weight"])
    assert_shards_agree(tmp_path / "made", "cpu")


@pytest.mark.parametrize("form", ["fp8", "w4a16-order"])
def test_sharded_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str) -> None:
    folder = make_hf_folder(tmp_path / "plain", "qwen2", sharded=True)
    values = quantize(folder, tmp_path / "made", form)
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "made")
    assert all(loaded[name].equal(matrix) for name, matrix in expected(values, 1).items())
    (line,) = [
        record.getMessage() for record in caplog.records if "as they are loaded" in record.getMessage()
    ]
    assert (
        "become float32" in line and f"{sum(each.nbytes for each in loaded.values()) / 1e9:.2f} GB of" in line
    )


@pytest.mark.parametrize(
    ("form", "backend"), [("fp8-block", "cpu"), ("gptq-4-order", "torch"), ("awq", "cpu")]
)
def test_greedy_tokens_are_those_of_transformers(
    plain: Path, tmp_path: Path, form: str, backend: str
) -> None:
    values = quantize(plain, tmp_path / "made", form)
    theirs = reference(plain)
    theirs.load_state_dict(values, strict=False)
    prompts = make_prompts(3, 320, seed=5, longest=20)
    engine = make_engine(tmp_path / "made", attention_backend=backend)
    for prompt, found in zip(prompts, generate_ids(engine, prompts, 12), strict=True):
        logits = theirs(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        assert found == logits.argmax(-1).tolist()


# ---- what is quantised, and what is not ----------------------------------------------------------------


def configure(folder: Path, **changes: Any) -> None:
    """Change keys of quantization_config; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config["quantization_config"]
    config["quantization_config"] = {k: v for k, v in {**part, **changes}.items() if v is not None}
    path.write_text(json.dumps(config))


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of the second layer's `up`; names are the last part."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for suffix, value in changes.items():
        tensors.pop(f"{UP}{suffix}", None)
        if value is not None:
            tensors[f"{UP}{suffix}"] = value.contiguous()
    save_file(tensors, path)


def unquantize(folder: Path, plain: Path, modules: tuple[str, ...]) -> None:
    """Put the plain matrices of these modules back."""
    path = folder / "model.safetensors"
    tensors, before = load_file(path), load_file(plain / "model.safetensors")
    for module in modules:
        for name in [name for name in tensors if name.startswith(module)]:
            del tensors[name]
        tensors[f"{module}weight"] = before[f"{module}weight"]
    save_file(tensors, path)


IGNORED = [
    ("fp8", {"ignored_layers": [Q[:-1], UP[:-1]]}),
    (
        "fp8-block",
        {"modules_to_not_convert": ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj", "lm_head"]},
    ),
    ("compressed-fp8-channel", {"ignore": ["lm_head", "re:.*layers.1.*(q|up)_proj$"]}),
    ("w4a16", {"ignore": ["lm_head", Q[:-1], UP[:-1]]}),
    ("modelopt-fp8", {"ignore": ["lm_head", "model.layers.1.*q_proj", "*.1.mlp.up_proj"]}),
    ("awq", {"modules_to_not_convert": ["1.self_attn.q_proj", "1.mlp.up_proj"]}),
]


@pytest.mark.parametrize(("form", "changes"), IGNORED)
def test_modules_that_the_configuration_ignores(
    plain: Path, tmp_path: Path, form: str, changes: dict[str, Any]
) -> None:
    values = quantize(plain, tmp_path, form)
    configure(tmp_path, **changes)
    with pytest.raises(
        ModelFileError, match=r"q_proj\.\w+ (is stored as F8_E4M3, although|is missing)|missing"
    ):
        load(tmp_path)
    unquantize(tmp_path, plain, (Q, UP))
    before = load_file(plain / "model.safetensors")
    values |= {name: before[name] for name in (f"{Q}weight", f"{UP}weight")}
    loaded = load(tmp_path)
    for layer in range(2):
        assert all(loaded[name].equal(matrix) for name, matrix in expected(values, layer).items())


@pytest.mark.parametrize("form", ["fp8", "gptq-4", "awq", "w8a16"])
def test_a_plain_matrix_that_the_configuration_quantises(plain: Path, tmp_path: Path, form: str) -> None:
    quantize(plain, tmp_path, form)
    unquantize(tmp_path, plain, (UP,))
    with pytest.raises(ModelFileError, match=rf"{UP}weight is (there, although|stored as F32, but) quanti"):
        load(tmp_path)


def test_groups_by_their_modules(plain: Path, tmp_path: Path) -> None:
    """Attention in 4 bits and the MLP in 8, each with a format of its own."""
    four, eight = (quantize(plain, tmp_path / form, form) for form in ("w4a16", "compressed-fp8-channel"))
    tensors = load_file(tmp_path / "w4a16" / "model.safetensors")
    others = load_file(tmp_path / "compressed-fp8-channel" / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    mixed |= {name: tensor for name, tensor in others.items() if ".mlp." in name}
    save_file(mixed, tmp_path / "w4a16" / "model.safetensors")
    small = quantize_checkpoint.packed_config(GROUP)["config_groups"]["group_0"]
    large = quantize_checkpoint.float_config("channel")["config_groups"]["group_0"]
    groups = {
        "group_0": {**small, "format": "pack-quantized"},
        "group_1": {**large, "format": "float-quantized", "targets": [r"re:.*mlp\..*"]},
    }
    configure(tmp_path / "w4a16", format="mixed-precision", config_groups=groups)
    loaded = load(tmp_path / "w4a16")
    assert loaded["layers.1.qkv"].equal(expected(four, 1)["layers.1.qkv"])
    assert loaded["layers.1.gate_up"].equal(expected(eight, 1)["layers.1.gate_up"])


def test_a_quantised_head(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path, "gptq-4")
    configure(tmp_path, lm_head=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = quantize_checkpoint.write_gptq(tensors.pop("lm_head.weight"), GROUP)
    save_file(
        {**tensors, **{f"lm_head.{suffix}": tensor for suffix, tensor in head.tensors.items()}},
        tmp_path / "model.safetensors",
    )
    assert load(tmp_path)["lm_head"].equal(head.values)


def test_modelopts_own_file(plain: Path, tmp_path: Path) -> None:
    values = quantize(plain, tmp_path, "modelopt-fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    own = tmp_path / "hf_quant_config.json"
    own.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": inner}))
    assert load(tmp_path)["layers.1.down"].equal(values[f"{DOWN}weight"])
    own.write_text(json.dumps({"quantization": {**inner, "kv_cache_quant_algo": "FP8"}}))
    quantization = load_spec(tmp_path).quantization
    assert quantization is not None and quantization.fp8_cache
    own.write_text(json.dumps({"quantization": {**inner, "kv_cache_quant_algo": "INT8"}}))
    with pytest.raises(
        ModelFileError, match=r"hf_quant_config\.json: quantization\.kv_cache_quant_algo 'INT8'"
    ):
        load_spec(tmp_path)


def test_biases_that_gptqs_writers_add(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path, "gptq-4")
    edit(tmp_path, bias=torch.zeros(160))
    load(tmp_path)
    edit(tmp_path, bias=torch.full((160,), 1e-4))
    with pytest.raises(ModelFileError, match=rf"tensor {UP}bias is there, but not used"):
        load(tmp_path)


# ---- what is damaged or not read -----------------------------------------------------------------------


BROKEN: list[tuple[str, dict[str, torch.Tensor | None], str]] = [
    ("fp8", {"weight_scale": None}, "weight_scale is missing"),
    ("fp8", {"weight_scale": torch.ones(2)}, "weight_scale has shape [2]"),
    ("fp8", {"weight_scale": torch.tensor([float("nan")])}, "weight_scale has values that are not finite"),
    ("fp8", {"weight_scale": torch.tensor([1])}, "weight_scale is stored as I64"),
    ("fp8", {"weight": torch.ones(160, 144, dtype=torch.int8)}, "weight is stored as I8"),
    ("fp8", {"k_scale": torch.ones(1)}, "k_scale is there, but not used"),
    ("fp8-static", {"input_scale": torch.tensor(float("inf"))}, "input_scale has values that are not finite"),
    ("fp8-block", {"weight_scale_inv": torch.ones(2, 1)}, "weight_scale_inv has shape [2, 1]"),
    ("fp8-block", {"weight_scale_inv": None}, "weight_scale is missing"),
    ("compressed-fp8-channel", {"weight_scale": torch.ones(1)}, "weight_scale has shape [1]"),
    (
        "gptq-4",
        {"qzeros": torch.full((5, 20), 0x66666666, dtype=torch.int32)},
        "qzeros has other zero points",
    ),
    ("gptq-4", {"scales": None}, "scales is missing"),
    ("gptq-4", {"g_idx": torch.arange(144, dtype=torch.int32)}, "g_idx is not in order"),
    ("gptq-4", {"qweight": torch.ones(18, 80, dtype=torch.int32)}, "qweight has shape [18, 80]"),
    ("gptq-4-order", {"g_idx": None}, "g_idx is missing"),
    ("gptq-4-order", {"g_idx": torch.full((144,), 5, dtype=torch.int32)}, "g_idx names groups beyond the 5"),
    ("gptq-4-order", {"g_idx": torch.full((144,), -1, dtype=torch.int32)}, "g_idx names groups beyond the 5"),
    (
        "gptq-4-asymmetric",
        {"qzeros": torch.full((5, 20), 0xF, dtype=torch.int32)},
        "qzeros has the zero point 15",
    ),
    ("awq", {"scales": torch.full((5, 160), float("inf")).half()}, "scales has values that are not finite"),
    ("awq", {"qzeros": None}, "qzeros is missing"),
    ("w4a16", {"weight_shape": torch.tensor([160, 143])}, "weight_shape is [160, 143]"),
    (
        "w4a16",
        {"weight_zero_point": torch.zeros(20, 5, dtype=torch.int32)},
        "weight_zero_point is there, but",
    ),
    ("w4a16-order", {"weight_g_idx": None}, "weight_g_idx is missing"),
    ("w4a16-asymmetric", {"weight_zero_point": None}, "weight_zero_point is missing"),
]


@pytest.mark.parametrize(("form", "changes", "problem"), BROKEN)
def test_a_broken_tensor_is_named(
    plain: Path, tmp_path: Path, form: str, changes: dict[str, torch.Tensor | None], problem: str
) -> None:
    quantize(plain, tmp_path, form)
    edit(tmp_path, **changes)
    with pytest.raises(ModelFileError) as caught:
        load(tmp_path)
    assert f"tensor {UP}{problem}" in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_codes_without_a_configuration(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelFileError, match=r"is stored as F8_E4M3, and config\.json has no quantization_config"
    ):
        load(tmp_path)


def test_rows_that_are_no_whole_words(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "llama", num_hidden_layers=1, hidden_size=90, head_dim=10)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantize_checkpoint.awq_config(GROUP)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"q_proj\.weight: \[90, 90\] is not in whole words of 8"):
        load(folder)


# ---- codes that stay packed on a GPU ---------------------------------------------------------------------


PACKED_FORMS = tuple(name for name in FORMS if name.startswith(("gptq", "awq", "w")))


@pytest.mark.parametrize("group", [32, 64, 128, 48])
@pytest.mark.parametrize("form", PACKED_FORMS)
def test_packed_codes_stand_for_the_same_values(tmp_path: Path, plain: Path, form: str, group: int) -> None:
    """The columns are 144: no multiple of a group nor of a run of words. Groups of 48 do not fit a run."""
    values = quantize(plain, tmp_path, form, group)
    kept = load_weights(tmp_path, load_spec(tmp_path), "auto", torch.float32, packed=(CodedTensor,))
    for name, matrix in expected(values, 1).items():
        matrix_kept = kept[name]
        # The exporter sorts the columns of each matrix by itself, so that parts of one differ.
        alone = not form.endswith("order") or name.endswith((".o", ".down"))
        assert isinstance(matrix_kept, CodedTensor) == (group != 48 and alone)
        if isinstance(matrix_kept, CodedTensor):
            assert (matrix_kept.order is not None) == form.endswith("order")
            matrix_kept = matrix_kept.dequantized(torch.float32)
        assert matrix_kept.equal(matrix), name


@pytest.mark.parametrize("form", PACKED_FORMS)
def test_a_shard_keeps_its_part_of_packed_codes(plain: Path, tmp_path: Path, form: str) -> None:
    """Rows anywhere, and columns where no group is cut; in another order all columns are one shard's."""
    quantize(plain, tmp_path, form, 32)
    spec, whole = load_spec(tmp_path), load(tmp_path)
    for rank in range(3):
        shard = Shard(rank, 3)
        dense = load(tmp_path, shard=shard)
        kept = load_weights(tmp_path, spec, "auto", torch.float32, packed=(CodedTensor,), shard=shard)
        for name, matrix in kept.items():
            found = matrix.dequantized(torch.float32) if isinstance(matrix, CodedTensor) else matrix
            assert found.equal(dense[name]), name
    assert whole.keys() == kept.keys()


@pytest.mark.parametrize("form", [form for form in PACKED_FORMS if "8" not in form])
@pytest.mark.parametrize("rank", [None, 1])
def test_experts_that_stay_packed(tmp_path: Path, form: str, rank: int | None) -> None:
    """Each expert's matrices in its place of the slot; not those whose columns have an order of their own."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    folder = make_hf_folder(tmp_path / "plain", "qwen3_moe", **sizes)
    quantize(folder, tmp_path / form, form, 32)
    shard = WHOLE if rank is None else Shard(rank, 2)
    spec, dense = load_spec(tmp_path / form), load(tmp_path / form, shard=shard)
    kept = load_weights(tmp_path / form, spec, "auto", torch.float32, packed=(CodedTensor,), shard=shard)
    for name, matrix in dense.items():
        found = kept[name]
        if "experts" in name:
            assert isinstance(found, CodedTensor) == (not form.endswith("order"))
        if isinstance(found, CodedTensor):
            found = found.dequantized(torch.float32)
        assert found.equal(matrix), name


def test_random_weights_are_coded_as_the_configuration_says(plain: Path, tmp_path: Path) -> None:
    """For the speed of a format without a checkpoint; packed or not, the values are equal."""
    quantize(plain, tmp_path, "awq", 32)
    spec, options = load_spec(tmp_path), {"load_format": "dummy", "dtype": torch.float32}
    wide = load_weights(tmp_path, spec, **options)
    kept = load_weights(tmp_path, spec, **options, packed=(CodedTensor,))
    before = load_weights(plain, load_spec(plain), **options)
    for name in FUSED:
        matrix = kept[f"layers.1.{name}"]
        assert isinstance(matrix, CodedTensor)
        assert matrix.dequantized(torch.float32).equal(wide[f"layers.1.{name}"])
        error = wide[f"layers.1.{name}"] - before[f"layers.1.{name}"]
        assert 0.05 < error.norm() / before[f"layers.1.{name}"].norm() < 0.15
