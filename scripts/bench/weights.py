"""Provides one model in the forms that engines load: a Hugging Face folder or a GGUF file, by dtype."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from microvllm.openai_compat.bench.client import BenchError

WRITER = Path(__file__).resolve().parent.parent / "write_checkpoint.py"


@dataclass(frozen=True, slots=True)
class Weights:
    """The model as it was given, and a folder for what is written from it, once each."""

    model: Path
    """A Hugging Face folder or a GGUF file."""
    gguf: Path | None
    """The same weights as a GGUF file, if there is one."""
    folder: Path
    say: Callable[[str], None]

    def as_folder(self, dtype: str) -> Path:
        """A Hugging Face folder; from a GGUF file in `dtype`, else as it is. Raises `BenchError`."""
        return self.model if self.model.is_dir() else self._written(self.model, f"hf-{dtype}", dtype)

    def as_gguf(self, dtype: str) -> tuple[Path, str]:
        """A GGUF file and its number format; `dtype` is file, f32, f16 or bf16. Raises `BenchError`."""
        if self.gguf is None:
            raise BenchError("wants a GGUF file of the model: --gguf FILE")
        if dtype == "file":
            return self.gguf, gguf_format(self.gguf)
        return self._written(self.gguf, f"{self.gguf.stem}.{dtype}.gguf", dtype), dtype

    def with_weights(self) -> Weights:
        """The same; of a folder that holds a configuration alone, with random weights in bfloat16."""
        if not self.model.is_dir() or any(self.model.glob("*.safetensors")):
            return self
        return replace(self, model=self._written(self.model, self.model.name, "bfloat16"))

    def _written(self, source: Path, name: str, dtype: str) -> Path:
        """What write_checkpoint.py makes of `source`, in a process of its own, once."""
        target = self.folder / name
        if not target.exists():
            self.say(f"writing {name}, weights in {dtype}")
            partial = target.with_name(f"partial-{name}")  # not taken for a whole one after an interrupt
            command = [sys.executable, str(WRITER), str(source), str(partial), "--dtype", dtype]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                raise BenchError(answer.stderr.strip().splitlines()[-1])
            partial.rename(target)
        return target


def gguf_format(file: Path) -> str:
    """The number format of most of a GGUF file's weights, such as `Q4_1`."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=sizes.__getitem__)
