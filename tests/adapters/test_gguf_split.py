"""A GGUF model in several files: read as one, given any of them; missing or foreign parts are one error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, make_engine
from refusals import refusal
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.runtime.text.tokenizer import Tokenizer

NUM_TENSORS = 3 * 9 + 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("models") / "hf", "llama")


def split(path: Path, source: Path, tensors: int = 12, **options: Any) -> list[Path]:
    """The model of a folder in parts of `tensors` tensors."""
    write_gguf(path / "m.gguf", source, tensors_a_part=tensors, **options)
    return sorted(path.glob("m-*.gguf"))


def problem(path: Path) -> str:
    return refusal(GGUFFile, path)


@pytest.mark.parametrize("no_tensors_first", [False, True])
@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_parts_are_read_as_one_model(
    tmp_path: Path, source: Path, quantization: str, no_tensors_first: bool
) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", source, quantization=quantization)
    parts = split(tmp_path, source, quantization=quantization, no_tensors_first=no_tensors_first)
    names = [f"m-0000{index + 1}-of-0000{len(parts)}.gguf" for index in range(len(parts))]
    assert [part.name for part in parts] == names and len(parts) == 3 + no_tensors_first
    expected = load_weights(whole, load_spec(whole), "auto", torch.float32)
    for part in parts:
        assert load_spec(part) == load_spec(whole)
        assert Tokenizer.load(part).encode("Hello") == Tokenizer.load(whole).encode("Hello")
        weights = load_weights(part, load_spec(part), "auto", torch.float32)
        assert weights.keys() == expected.keys()
        assert all(weights[name].equal(expected[name]) for name in expected)
    prompts = [[1, 2, 3], [40, 50]]
    packed = [generate_ids(make_engine(path), prompts, 6) for path in (whole, parts[1])]
    assert packed[0] == packed[1]


def test_missing_parts_are_named_together(tmp_path: Path, source: Path) -> None:
    parts = split(tmp_path, source, 5)
    for part in parts[1:]:
        part.unlink()
    message = problem(parts[0])
    assert f"is one of {len(parts)} parts, of which are missing: {parts[1].name}, {parts[2].name}" in message
    assert f"and {len(parts) - 4} more" in message
    shutil.copy(parts[0], parts[2])
    parts[0].unlink()
    assert "is part 1 of" in problem(parts[2])


def test_a_renamed_part_is_refused(tmp_path: Path, source: Path) -> None:
    parts = split(tmp_path, source)
    other = parts[0].rename(tmp_path / "renamed.gguf")
    assert "is part 1 of 3, but not named NAME-00001-of-00003.gguf" in problem(other)
    shutil.copy(parts[1], parts[0])
    assert "m-00001-of-00003.gguf: is part 2 of 3" in problem(parts[2])


def test_parts_of_other_models_are_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "other").mkdir()
    deeper = make_hf_folder(tmp_path / "deeper", "llama", num_hidden_layers=2)
    parts, others = split(tmp_path, source), split(tmp_path / "other", deeper, 7)
    assert len(parts) == len(others) == 3
    shutil.copy(others[2], parts[2])
    message = problem(parts[0])
    assert "also in" in message or f"tensors instead of {NUM_TENSORS}" in message


def test_a_truncated_part_is_named(tmp_path: Path, source: Path) -> None:
    parts = split(tmp_path, source)
    parts[1].write_bytes(parts[1].read_bytes()[:-200])
    assert problem(parts[0]).startswith(f"{parts[1]}: tensor ")
