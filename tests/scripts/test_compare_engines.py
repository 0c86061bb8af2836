"""The comparison of engines: the command lines and weights of those that are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from bench import engines
from bench.engines import Setup, Spec, build, named
from bench.servers import Server
from bench.weights import Weights, gguf_format
from bench.workloads import OFFLINE
from compare_case import SCRIPTS, needs_proc
from model_tools import load_script

from microvllm.adapters.registry import load_spec
from microvllm.openai_compat.bench.client import BenchError, Completion, Conversation, measure


def setup_for(model: Path, tmp_path: Path, **programs: str) -> Setup:
    file = model if model.is_file() else None
    return Setup(Weights(model, file, tmp_path, lambda line: None), "cpu", 512, 3, programs)


def test_engines_get_the_same_weights_and_their_own_flags(tmp_path: Path, model: Path) -> None:
    llama = tmp_path / "llama-server"
    llama.write_text("#!/bin/sh\necho 'version: 77 (abc)' >&2\n")
    llama.chmod(0o755)
    setup = setup_for(model, tmp_path, **{"llama.cpp": str(llama)})
    specs = named(
        [
            Spec.parse("microvllm"),
            Spec.parse("name=ours-q4 kind=microvllm args='--block-size 32 --seed 1' env='A=1 B=2'"),
            Spec.parse("microvllm dtype=float32"),
            Spec.parse("hf-generate dtype=float32"),
            Spec.parse("llama.cpp"),
            Spec.parse("llama.cpp dtype=bf16 args='--threads 2'"),
            Spec.parse("name=mine url=http://localhost:1/v1 model=m"),
        ]
    )
    ours, q4, plain, loop, file, converted, other = (build(spec, setup) for spec in specs)
    assert [spec.name for spec in specs] == [
        *(
            "microvllm",
            "ours-q4",
            "microvllm float32",
            "hf-generate float32",
            "llama.cpp",
            "llama.cpp bf16",
            "mine",
        )
    ]
    assert str(model) in ours.command and ours.weights == ("Q8_0" if ours.quantized else "bfloat16")
    assert plain.weights == "float32" and not plain.quantized and "dequantized" in plain.command
    assert q4.command[-4:] == ["--block-size", "32", "--seed", "1"]
    assert (q4.environment["A"], q4.environment["B"]) == ("1", "2")
    assert str(tmp_path / "hf-float32") in loop.command
    assert json.loads((tmp_path / "hf-float32" / "config.json").read_text())["model_type"] == "llama"
    assert str(model) in file.command and (file.weights, file.version) == ("Q8_0", "77 (abc)")
    assert file.quantized and not converted.quantized
    assert file.command[file.command.index("--parallel") + 1] == "3"
    assert converted.command[-2:] == ["--threads", "2"] and converted.weights == "bf16"
    assert str(tmp_path / "tiny.bf16.gguf") in converted.command
    spec = load_spec(tmp_path / "tiny.bf16.gguf")
    quantized = load_spec(model)
    assert msgspec.structs.replace(spec, dtype=quantized.dtype) == quantized, "only the number format differs"
    assert gguf_format(tmp_path / "tiny.bf16.gguf") == "BF16"
    assert other.target(other.url).url == "http://localhost:1" and other.target(other.url).model == "m"
    assert ours.command_at(99)[ours.command.index("--port") + 1] == "99"


def test_command_lines_on_a_gpu(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache size for both engines, each with the others in the GPU's memory; flags of the user last."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho vllm 0.26\necho torch 2.11\necho microvllm 0.1\n")
    python.chmod(0o755)
    monkeypatch.setattr(engines, "_microvllm_defaults", lambda *_: ("bfloat16", "triton", False))
    setup = replace(setup_for(model.parent / "hf", tmp_path), device="cuda", context=4096)
    setup = replace(setup, kv_cache_bytes=23_000_000_000)
    shared = f"--model {model.parent / 'hf'} --served-model-name bench"
    end = "--host 127.0.0.1 --port {port} --kv-cache-memory-bytes 23000000000"
    both = f"--max-model-len 4096 --enable-prompt-tokens-details --disable-uvicorn-access-log {end}"
    offline = f"scripts/bench/offline_server.py {{}} {model.parent / 'hf'} {{{{port}}}} --max-model-len 4096"
    offline += " --kv-cache-memory-bytes 23000000000"
    expected = {
        "microvllm": f"-m microvllm.cli serve {shared} --device cuda --dtype bfloat16 {both}",
        "vllm args='--seed 1'": f"-m vllm.entrypoints.openai.api_server {shared} --dtype bfloat16 {both} "
        "--gpu-memory-utilization 0.35 --seed 1",
        "microvllm-offline": offline.format("microvllm").format(port="{port}"),
        "vllm-offline": offline.format("vllm").format(port="{port}"),
    }
    for text, words in expected.items():
        engine = build(Spec.parse(f"{text} program={python}"), setup)
        assert " ".join(engine.command).removeprefix(f"{python} ").removeprefix(f"{SCRIPTS.parent}/") == words
        assert engine.offline == (engine.workloads == (OFFLINE,)) == ("offline" in text)
    alone = build(Spec.parse(f"vllm program={python}"), replace(setup, kv_cache_bytes=None))
    assert alone.command[-1] == "{port}", "alone in the GPU's memory it sizes its own cache"


def test_engines_that_make_up_weights(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written or read; requests are sampled, as greedy texts of random weights soon repeat."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho vllm 0.33\necho torch 2.14\necho microvllm 0.1\n")
    python.chmod(0o755)
    monkeypatch.setattr(engines, "_microvllm_defaults", lambda *_: ("bfloat16", "triton", False))
    setup = replace(setup_for(tmp_path, tmp_path), device="cuda", dummy=True, temperature=0.7)
    for kind in ("microvllm", "vllm"):
        engine = build(Spec.parse(f"{kind} program={python}"), setup)
        assert "--load-format dummy" in " ".join(engine.command)
        assert json.loads(engine.target("http://x").body({}, 1))["temperature"] == 0.7
    with pytest.raises(BenchError, match="--load-format dummy"):
        build(Spec.parse("hf-generate"), setup)
    with pytest.raises(BenchError, match="--temperature"):
        build(Spec.parse("hf-generate"), replace(setup, dummy=False))


def test_llama_cpp_wants_a_gguf_file(tmp_path: Path, model: Path) -> None:
    setup = setup_for(model.parent / "hf", tmp_path, **{"llama.cpp": sys.executable})
    with pytest.raises(BenchError, match="--gguf FILE"):
        build(Spec("llama.cpp", "llama.cpp"), setup)


@needs_proc
def test_hugging_face_generate_answers_as_a_server(tmp_path: Path, model: Path) -> None:
    """Whole: the adapter on a tiny model, requests of several lengths in one batch, and a chat."""
    engine = build(
        Spec.parse("name=loop kind=hf-generate dtype=float32 env='OMP_NUM_THREADS=1'"),
        setup_for(model.parent / "hf", tmp_path),
    )
    server = Server(engine, tmp_path)
    try:
        server.wait_ready(120)
        words = ["the lazy dog", "a block is shared", "the"]
        users = [Completion(prompt, length) for prompt, length in zip(words, (3, 9, 5), strict=True)]
        together = measure(server.target, users)
        alone = measure(server.target, users, concurrency=1)
        chats = measure(server.target, [Conversation("Be brief.", ("Hello", "the dog"), 4)])
    finally:
        server.stop()
    assert not together.errors + alone.errors + chats.errors
    assert [request.completion_tokens for request in together.requests] == [3, 9, 5]
    assert [request.text for request in together.requests] == [request.text for request in alone.requests]
    assert chats.requests[1].prompt_tokens > chats.requests[0].prompt_tokens + 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3)])
def test_converted_gguf_has_the_same_values_and_metadata(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<end>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_file_type(3)
    matrix = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    vector = np.arange(5, dtype=np.float32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("m", gguf.quants.quantize(matrix, q8), raw_dtype=q8)
    writer.add_tensor("v", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert load_script("write_checkpoint").main([str(source), str(target), "--dtype", dtype]) == 0

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    names = {name for name in before.fields if not name.startswith("GGUF.")} - {"general.file_type"}
    assert names == {name for name in after.fields if not name.startswith("GGUF.")}
    for name in names:
        assert after.fields[name].contents() == before.fields[name].contents()
        assert after.fields[name].types == before.fields[name].types
    old, new = ({tensor.name: tensor for tensor in reader.tensors} for reader in (before, after))
    assert new["m"].tensor_type.name == dtype.upper() and new["v"].tensor_type.name == "F32"
    values = gguf.quants.dequantize(new["m"].data, new["m"].tensor_type)
    np.testing.assert_allclose(
        values, gguf.quants.dequantize(old["m"].data, q8), rtol=tolerance, atol=1e-6 * bool(tolerance)
    )
    np.testing.assert_array_equal(new["v"].data, vector)
