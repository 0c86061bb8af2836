"""What scripts/write_checkpoint.py writes loads in transformers, and computes what its source computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tiny_models import make_hf_folder, reference, write_gguf

from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "write_checkpoint.py"


def export(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("write_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    status: int = script.main([str(argument) for argument in arguments])
    return status


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_exported_folder_computes_the_same(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    qwen = {"norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2}
    options = qwen if family == "qwen3_moe" else {}
    source = make_hf_folder(tmp_path / "source", family, tie=family == "qwen3", **options)
    file = write_gguf(tmp_path / "model.gguf", source)
    assert export(file, tmp_path / "out", "--dtype", "float32") == 0
    ids = torch.tensor([[5, 200, 33, 319, 71, 4]])
    with torch.no_grad():
        expected, logits = reference(source)(ids).logits, reference(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    spec, wanted = load_spec(tmp_path / "out"), load_spec(source)
    # The folder also names the ends that the file's vocabulary is known to have.
    assert spec == replace(wanted, eos_token_ids=load_spec(file).eos_token_ids)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out")]
    messages = [{"role": "user", "content": "naïve 世界?"}]
    prompts = [one.apply_chat_template(messages, tokenize=False) for one in tokenizers]
    assert prompts[0] == prompts[1]
    assert tokenizers[0](prompts[0]).input_ids == tokenizers[1](prompts[1]).input_ids
    assert tokenizers[0].eos_token == tokenizers[1].eos_token == "<|im_end|>"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_random_weights_of_a_configuration(tmp_path: Path, family: str) -> None:
    source = make_hf_folder(tmp_path / "source", family, tie=family == "qwen3")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    assert export(source, tmp_path / "out", "--dtype", "float32") == 0
    model = reference(tmp_path / "out")  # strict: every tensor is there, and none is left over
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    weights = load_weights(tmp_path / "out", load_spec(tmp_path / "out"), "auto", torch.float32)
    torch.testing.assert_close(weights["embed"], model.get_input_embeddings().weight.detach())
    assert export(tmp_path / "out", tmp_path / "again") == 1, "it has weights already"


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"<html>")
    assert export(tmp_path / "bad.gguf", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.gguf" in error
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "bad.gguf", tmp_path) == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.model
def test_smollm2_knows_paris(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert export("smollm2-135m-instruct", tmp_path / "out") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = reference(tmp_path / "out").generate(ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
