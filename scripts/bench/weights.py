"""One model in the forms that the engines want: a Hugging Face folder or a GGUF file, in several dtypes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from microvllm.openai_compat.bench.client import BenchError

EXPORT = Path(__file__).resolve().parent.parent / "write_checkpoint.py"


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
        if self.model.is_dir():
            return self.model
        target = self.folder / f"hf-{dtype}"
        if not target.exists():
            self.say(f"writing the weights as a Hugging Face folder in {dtype}")
            command = [sys.executable, str(EXPORT), str(self.model), str(target), "--dtype", dtype]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                raise BenchError(answer.stderr.strip().splitlines()[-1])
        return target

    def as_gguf(self, dtype: str) -> tuple[Path, str]:
        """A GGUF file and its number format; `dtype` is file, f32, f16 or bf16. Raises `BenchError`."""
        if self.gguf is None:
            raise BenchError("wants a GGUF file of the model: --gguf FILE")
        if dtype == "file":
            return self.gguf, gguf_format(self.gguf)
        target = self.folder / f"{self.gguf.stem}.{dtype}.gguf"
        if not target.exists():
            self.say(f"writing the weights as a GGUF file in {dtype}")
            convert_gguf(self.gguf, target, dtype)
        return target, dtype


def gguf_format(file: Path) -> str:
    """The number format of most of a GGUF file's weights, such as `Q4_1`."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=sizes.__getitem__)


def convert_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write a copy of a GGUF file whose matrices are in `dtype` (`f32`, `f16`, `bf16`), the rest as it was.

    Quantised weights become the values that they stand for.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, str(architecture))
    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        kind = entry.types[0]
        inner = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), kind, inner)
    wanted = GGMLQuantizationType[dtype.upper()]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        number_format = wanted if values.ndim > 1 else GGMLQuantizationType.F32  # llama.cpp wants norms so
        writer.add_tensor(tensor.name, quantize(values, number_format), raw_dtype=number_format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
