"""Makes the scripts and their parts importable; a model for the comparison of engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import make_hf_folder, write_gguf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF file, for the comparison to find."""
    folder = tmp_path_factory.mktemp("compare")
    return write_gguf(
        folder / "tiny.gguf", make_hf_folder(folder / "hf", "llama", hidden_size=288), quantization="Q8_0"
    )
