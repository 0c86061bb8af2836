"""`load_weights`: every slice equals transformers' own tensor; what is damaged or does not fit is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, QUANTIZABLE, make_hf_folder, reference, write_gguf

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.backends import make_operators
from microvllm.runtime.options.find_model import DEMO_MODEL, find_model

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie": True},
    "mistral": {},
    "qwen2": {},
    "qwen2-tied": {"tie": True},
    "qwen3": {},
    "qwen3-bias": {"attention_bias": True},
}


def load(
    model: Path, dtype: torch.dtype = torch.float32, load_format: str = "auto"
) -> dict[str, torch.Tensor]:
    return load_weights(model, load_spec(model), load_format, dtype)


def problem(model: Path, load_format: str = "auto") -> str:
    return refusal(lambda: load(model, load_format=load_format))


def expected_weights(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """transformers' state dict, stacked as the decoder wants it."""
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if "lm_head.weight" in state:
        weights["lm_head"] = state["lm_head.weight"]
    fused = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
        "mixer_norm": ("input_layernorm",),
        "mlp_norm": ("post_attention_layernorm",),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
    }
    for layer in range(num_layers):
        for name, parts in fused.items():
            for suffix, ending in (("weight", ""), ("bias", "_bias")):
                names = [f"model.layers.{layer}.{part}.{suffix}" for part in parts]
                if names[0] in state:
                    weights[f"layers.{layer}.{name}{ending}"] = torch.cat([state[one] for one in names])
    return weights


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sharded", [False, True])
def test_equals_transformers(tmp_path: Path, name: str, sharded: bool) -> None:
    options = OPTIONS[name]
    make_hf_folder(tmp_path, name.split("-")[0], sharded=sharded, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    state = dict(reference(tmp_path).state_dict())
    if options.get("tie"):
        assert state.pop("lm_head.weight").equal(state["model.embed_tokens.weight"])
    expected = expected_weights(state, 3)
    weights = load(tmp_path)
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
        assert tensor.equal(expected[key]), key


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_converts_dtypes(tmp_path: Path, stored: str, wanted: torch.dtype) -> None:
    make_hf_folder(tmp_path, "qwen2", dtype=stored)
    assert load_spec(tmp_path).dtype == stored
    state = load_file(tmp_path / "model.safetensors")
    for key, tensor in expected_weights(state, 3).items():
        assert load(tmp_path, wanted)[key].equal(tensor.to(wanted)), key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_round_trip(tmp_path: Path, family: str, quantization: str) -> None:
    """What llama.cpp's layout holds equals the folder up to the storage type, and exactly in float32."""
    sizes = QUANTIZABLE if quantization.startswith("Q") else {}
    folder = make_hf_folder(tmp_path / "hf", family, tie=quantization == "F16", num_hidden_layers=1, **sizes)
    from_folder = load(folder)
    from_gguf = load(write_gguf(tmp_path / "model.gguf", folder, quantization=quantization))
    assert from_gguf.keys() == from_folder.keys()
    bits = {"F32": 99, "F16": 11, "BF16": 8, "Q8_0": 7, "Q5_0": 4, "Q5_1": 4, "Q4_0": 3, "Q4_1": 3}[
        quantization
    ]
    for key, tensor in from_gguf.items():
        error = (tensor - from_folder[key]).norm() / from_folder[key].norm()
        assert error <= 2.0**-bits, key
        if tensor.ndim == 1 or quantization == "F32":
            assert error == 0, key


def test_interleaved_rows_of_llama_are_put_back(tmp_path: Path) -> None:
    """Only llama's q and k (weights and biases) are stored interleaved; a plain read of them would differ."""
    folder = make_hf_folder(tmp_path / "hf", "llama", attention_bias=True)
    file = write_gguf(tmp_path / "model.gguf", folder)
    from microvllm.adapters.files.gguf_file import GGUFFile

    stored = torch.tensor(GGUFFile(file).tensor("blk.0.attn_q.weight"))
    weights, expected = load(file), load(folder)
    assert not stored.equal(expected["layers.0.qkv"][: len(stored)])
    assert weights["layers.0.qkv"].equal(expected["layers.0.qkv"])
    assert weights["layers.0.qkv_bias"].equal(expected["layers.0.qkv_bias"])


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "qwen3")
    calls: list[tuple[int, int]] = []
    load_weights(tmp_path, load_spec(tmp_path), "auto", torch.float32, lambda *call: calls.append(call))
    total = len(load_file(tmp_path / "model.safetensors"))
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_dummy_weights(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "qwen3", attention_bias=True)
    real = load(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    weights, again = load(tmp_path, load_format="dummy"), load(tmp_path, load_format="dummy")
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in real.items()}
    for key, tensor in weights.items():
        assert tensor.equal(again[key])
        if key.endswith("norm"):
            assert tensor.eq(1).all()
        elif tensor.ndim == 2:
            assert 0.018 < tensor.std() < 0.022 and abs(tensor.mean()) < 0.002, key
            assert len(tensor[:, 0].unique()) > len(tensor) // 2, key
    assert not weights["layers.0.qkv"].equal(weights["layers.1.qkv"])


def test_load_format_must_fit(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "llama")
    file = write_gguf(tmp_path / "model.gguf", folder)
    assert load(folder, load_format="safetensors").keys() == load(file, load_format="gguf").keys()
    assert "gguf" in problem(folder, "gguf") and "safetensors" in problem(file, "safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_hf_folder(tmp_path / "hf", "qwen2")


NO_SAFETENSORS = [
    (b"", "the file is empty"),
    (b"1234567", "only 7 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98\n", "git-LFS pointer"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    (b"<html>\n<head>404</head></html>", "HTML"),
    (b"\x80\x02}q\x00." + bytes(100), "pickled"),
    (b"PK\x03\x04" + bytes(100), "pickled"),
    (b"GGUF" + bytes(100), "give its own path"),
    (struct.pack("<Q", 1 << 62) + bytes(100), "claims a header"),
    (struct.pack("<Q", 2), "claims a header"),
    (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "not UTF-8"),
    (struct.pack("<Q", 4) + b"{[}]", "not JSON"),
    (struct.pack("<Q", 4) + b"[1] ", "not a JSON object"),
    (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested"),
    (struct.pack("<Q", 7) + b'{"a":1}', "not an object"),
]


@pytest.mark.parametrize(("content", "said"), NO_SAFETENSORS)
def test_not_a_safetensors_file(folder: Path, content: bytes, said: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    message = problem(folder)
    assert message.startswith(str(folder / "model.safetensors"))
    assert said in message


def with_header(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def tensor_entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


BAD_HEADERS = [
    ({"a": tensor_entry(dtype="I16")}, "stored as 'I16'"),
    ({"a": tensor_entry(dtype="F8_E5M2")}, "stored as 'F8_E5M2'"),
    ({"a": tensor_entry(dtype=None)}, "stored as None"),
    ({"a": tensor_entry(dtype=["F32"])}, "stored as"),
    ({"a": tensor_entry(shape=[3])}, "do not hold"),
    ({"a": tensor_entry(shape=[-2])}, "not lists of sizes"),
    ({"a": tensor_entry(shape=[2.0])}, "not lists of sizes"),
    ({"a": tensor_entry(shape="2")}, "not lists of sizes"),
    ({"a": tensor_entry(data_offsets=[0, 8, 16])}, "not lists of sizes"),
    ({"a": tensor_entry(data_offsets=None)}, "not lists of sizes"),
    ({"a": tensor_entry(shape=[2] + [1] * 8)}, "9 dimensions, more than 8"),
    ({"a": tensor_entry(data_offsets=[8, 0])}, "do not hold"),
    ({"a": tensor_entry(shape=[1 << 40], data_offsets=[0, 1 << 42])}, "truncated"),
    ({"a": tensor_entry(data_offsets=[4, 12])}, "does not begin where"),
    ({"a": tensor_entry(), "b": tensor_entry()}, "does not begin where"),
    ({"a": tensor_entry(), "b": tensor_entry(data_offsets=[8, 16])}, "truncated"),
    ({}, "no tensor"),
    (b'{"a":%b,"a":%b}' % ((json.dumps(tensor_entry()).encode(),) * 2), "twice"),
]


@pytest.mark.parametrize(("header", "said"), BAD_HEADERS)
def test_bad_safetensors_header(folder: Path, header: Any, said: str) -> None:
    with_header(folder / "model.safetensors", header, bytes(8))
    message = problem(folder)
    assert message.startswith(str(folder / "model.safetensors")) and said in message, message


def test_truncated_or_with_extra_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 2000):
        path.write_bytes(whole[:length])
        assert "truncated" in problem(folder)
    path.write_bytes(whole + b"x")
    assert "belong to no tensor" in problem(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"]
)
def test_only_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / name)
    message = problem(folder)
    assert name in message and "run code" in message


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert str(folder) in problem(folder)


def edit(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)
    return folder


def test_wrong_shape_names_both(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    message = problem(edit(folder, **{name: torch.zeros(160, 145)}))
    assert str(folder / "model.safetensors") in message
    assert name in message and "[160, 145]" in message and "[160, 144]" in message
    assert name in problem(edit(folder, **{name: torch.zeros(144, 160)}))
    assert name in problem(edit(folder, **{name: torch.zeros(160 * 144)}))


def test_missing_tensors_are_named(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.bias"
    assert f"tensor {name} is missing" in problem(edit(folder, **{name: None}))
    changes = {f"model.layers.0.{part}_layernorm.weight": None for part in ("input", "post_attention")}
    message = problem(edit(folder, lm_head__weight=None, **changes))
    assert "model.layers.0.input_layernorm.weight" in message and "and 1 more are missing" in message


def test_unused_tensors_are_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    message = problem(edit(folder, **{name: torch.zeros(144)}))
    assert name in message and "not used" in message
    assert "layers.3" in problem(
        edit(folder, **{name: None, "model.layers.3.mlp.up_proj.weight": torch.zeros(1)})
    )


def test_rotary_buffers_and_the_tied_head_may_be_there(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama", tie=True)
    before = load(tmp_path)
    edit(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(16),
        lm_head__weight=before["embed"],
    )
    after = load(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[key].equal(before[key]) for key in before)


def test_a_tied_model_with_another_head_is_computed_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does; a fine-tune untied them and left the configuration as it was."""
    make_hf_folder(tmp_path, "llama", tie=True)
    head = torch.randn(320, 144)
    edit(tmp_path, lm_head__weight=head)
    assert load(tmp_path)["lm_head"].equal(head)
    assert "lm_head.weight differs from the embeddings" in caplog.text
    operators = make_operators("torch", torch.float32, 1)
    model = DecoderModel(load_spec(tmp_path), load(tmp_path), operators)
    hidden = torch.randn(2, 144)
    theirs = reference(tmp_path)
    torch.testing.assert_close(model.logits(hidden), theirs.lm_head(theirs.model.norm(hidden)).detach())


def test_a_copy_of_the_embeddings_in_another_dtype_is_no_other_head(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama", tie=True, dtype="bfloat16")
    edit(tmp_path, lm_head__weight=load(tmp_path)["embed"].float())
    assert "lm_head" not in load(tmp_path)


def test_an_untied_model_without_a_head_says_so(tmp_path: Path) -> None:
    make_hf_folder(tmp_path, "llama")
    message = problem(edit(tmp_path, lm_head__weight=None))
    assert "lm_head.weight is missing" in message and "tie_word_embeddings is false" in message


PREFIXES = [
    # of all but the head, of the head
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
    ("model.text_model.", "model.text_model."),
    ("model.language_model.model.", "model.language_model."),
    ("", ""),
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("prefix", "head_prefix"), PREFIXES)
def test_tensors_of_a_wrapped_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, head_prefix: str, tie: bool
) -> None:
    make_hf_folder(tmp_path, "llama", tie=tie)
    expected = load(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {
        f"{head_prefix}{name}"
        if name.startswith("lm_head.")
        else prefix + name.removeprefix("model."): tensor
        for name, tensor in stored.items()
    }
    if prefix:
        renamed["vision_tower.patch_embed.weight"] = torch.zeros(3, 3)
    save_file(renamed, tmp_path / "model.safetensors")
    weights = load(tmp_path)
    assert weights.keys() == expected.keys()
    assert all(weights[key].equal(expected[key]) for key in expected)
    assert ("vision_tower.patch_embed.weight is outside of" in caplog.text) == bool(prefix)
    del renamed[f"{prefix}layers.1.mlp.up_proj.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    assert f"tensor {prefix}layers.1.mlp.up_proj.weight is missing" in problem(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_hf_folder(tmp_path / "sharded", "qwen2", sharded=True)


def test_missing_shard(sharded: Path) -> None:
    first = min(sharded.glob("*.safetensors"))
    first.unlink()
    message = problem(sharded)
    assert first.name in message and "no such file" in message


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"", "empty"),
        (b"[]", "JSON object"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "not a plain file name"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        (b'{"weight_map": {"a": ".."}}', "not a plain file name"),
        (b'{"weight_map": {"a": 3}}', "not a plain file name"),
    ],
)
def test_bad_index(sharded: Path, index: bytes, said: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(index)
    message = problem(sharded)
    assert message.startswith(str(sharded / "model.safetensors.index.json")) and said in message


def test_index_that_disagrees_with_the_shards(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    path.write_text(json.dumps(index))
    message = problem(sharded)
    assert name in message and files[1] in message


def test_shards_without_an_index(sharded: Path) -> None:
    expected = load(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    weights = load(sharded)
    assert all(weights[key].equal(expected[key]) for key in expected)
    first = min(sharded.glob("*.safetensors"))
    (sharded / "copy.safetensors").write_bytes(first.read_bytes())
    assert "is also in copy.safetensors" in problem(sharded)


def test_gguf_with_a_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "llama", num_hidden_layers=2)
    extra = {"blk.1.attn_sinks.weight": torch.zeros(9).numpy()}
    assert "blk.1.attn_sinks.weight" in problem(write_gguf(tmp_path / "a.gguf", folder, extra_tensors=extra))
    more = write_gguf(tmp_path / "b.gguf", folder, extra_metadata={"llama.block_count": 3})
    assert "blk.2.attn_q.weight" in problem(more)
    fewer = write_gguf(tmp_path / "c.gguf", folder, extra_metadata={"llama.block_count": 1})
    assert "blk.1." in problem(fewer)
    other = write_gguf(tmp_path / "d.gguf", folder, extra_metadata={"llama.feed_forward_length": 320})
    message = problem(other)
    assert "[160, 144]" in message and "[320, 144]" in message


def load_in_a_process(model: Path, dtype: str) -> dict[str, Any]:
    """In MiB what loading adds to a process's peak resident memory ("peak") and the "size" of the weights.

    And of each tensor its shape and whether all its values are finite: "tensors".
    """
    # Not `ru_maxrss`, which begins with the peak of the process that starts this one.
    code = (
        "import json, re, sys, gguf, torch; from pathlib import Path\n"
        "from microvllm.adapters.registry import load_spec\n"
        "from microvllm.adapters.weights import load_weights\n"
        "spec = load_spec(Path(sys.argv[1]))\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 2**10\n"
        "before = peak()\n"
        "weights = load_weights(Path(sys.argv[1]), spec, 'auto', getattr(torch, sys.argv[2]))\n"
        "result = {'peak': peak() - before, 'size': sum(t.nbytes for t in weights.values()) / 2**20}\n"
        "tensors = {name: [list(t.shape), bool(t.isfinite().all())] for name, t in weights.items()}\n"
        "print(json.dumps({**result, 'tensors': tensors}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(model), dtype],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights beside which the rest of a process is small: 180 MiB, no tensor above 27 MiB."""
    sizes = {"vocab_size": 6000, "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 2}
    return make_hf_folder(tmp_path_factory.mktemp("large"), "llama", tokenizer=False, **sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_copy_in_memory(large: Path, dtype: str) -> None:
    """Resident: the result, and of the file only the tensor that is being copied."""
    loaded = load_in_a_process(large, dtype)
    assert loaded["size"] > 70
    assert loaded["peak"] < loaded["size"] + 60


@pytest.mark.model
def test_smollm2() -> None:
    path = find_model(DEMO_MODEL)
    spec = load_spec(path)
    assert (
        spec.num_layers,
        spec.hidden_size,
        spec.layers[0].mixer.num_heads,
        spec.layers[0].mixer.num_kv_heads,
    ) == (30, 576, 9, 3)
    assert (spec.vocab_size, spec.max_position, spec.layers[0].mixer.rope.theta, spec.tie_embeddings) == (
        49152,
        8192,
        1e5,
        True,
    )
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 0, 4))  # <|endoftext|>, <reponame>
    loaded = load_in_a_process(path, "bfloat16")
    tensors = loaded["tensors"]
    assert len(tensors) == 2 + 30 * 6
    assert all(finite for _, finite in tensors.values())
    assert tensors["layers.29.qkv"][0] == [960, 576] and tensors["layers.29.gate_up"][0] == [3072, 576]
    assert 255 < loaded["size"] < 260
    # The header, the file's 30 MiB embedding, and the pieces being dequantised.
    assert loaded["peak"] < loaded["size"] + 130
