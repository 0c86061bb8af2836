"""vLLM's load formats and attention backends: ours, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options import backends


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    content = json.dumps({"architectures": ["LlamaForCausalLM"], **config})
    (tmp_path / "config.json").write_text(content, "utf-8")
    return str(tmp_path)


@pytest.mark.parametrize("name", ["hf", *backends.SAFETENSORS_READERS, "SafeTensors"])
def test_another_reader_of_the_same_files(name: str, model: str, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineArgs(model=model, load_format=name, device="cpu", attention_backend="torch").resolve()
    assert config.load_format == "safetensors"
    lines = [record.getMessage() for record in caplog.records if "--load-format" in record.getMessage()]
    assert len(lines) == (name in backends.SAFETENSORS_READERS)


@pytest.mark.parametrize("name", backends.OTHER_FILES)
def test_other_files_are_refused_by_name(name: str, model: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--load-format {name} reads .*: only safetensors and GGUF"):
        EngineArgs(model=model, load_format=name).resolve()


@pytest.mark.parametrize("name", ["FLASHINFER", "TRITON_ATTN", "TORCH_SDPA", "CPU_ATTN"])
def test_another_attention_backend_is_ignored_with_a_line(
    name: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineArgs(model=model, attention_backend=name, device="cpu").resolve()
    assert config.attention_backend in ("cpu", "torch")
    assert f"--attention-backend {name} has no effect here" in caplog.text


def test_an_unknown_attention_backend_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="--attention-backend FLASHY"):
        EngineArgs(model=model, attention_backend="FLASHY", device="cpu").resolve()
