"""A weight format takes a class and an entry in `FORMATS`: here one of whole rows with a scale each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_hf_folder

from microvllm.adapters import weights
from microvllm.adapters.errors import ModelFileError, NoMemoryError
from microvllm.adapters.files.checkpoints import Checkpoint, stored_name
from microvllm.adapters.formats.weight_formats import Dense, allocate
from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard, Slot

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}


class Scaled(Dense):
    """`x.weight` [out, in] is multiplied by `x.scale` [out]."""

    def accepts(self, checkpoint: Checkpoint, slot: Slot) -> bool:
        names = [stored_name(checkpoint, part, slot.layer) for part in slot.parts]
        return slot.columns is not None and all(scale_name(name) in checkpoint.shapes() for name in names)

    def stored_shapes(self, checkpoint: Checkpoint, slot: Slot) -> dict[str, tuple[int, ...]]:
        shapes = super().stored_shapes(checkpoint, slot)
        return shapes | {scale_name(name): shape[:1] for name, shape in shapes.items()}

    def load(
        self, checkpoint: Checkpoint, slot: Slot, dtype: torch.dtype, device: str, loaded: Callable[[], None]
    ) -> torch.Tensor:
        values = super().load(checkpoint, slot, dtype, device, loaded)
        scales = torch.empty(len(values), dtype=dtype)
        pieces = torch.split(scales, [part.rows.size for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            name = scale_name(stored_name(checkpoint, part, slot.layer))
            checkpoint.copy(name, part, None, piece)
        return values * scales[:, None]


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The MLPs' matrices as whole numbers in float16 and a scale per row."""
    folder = make_hf_folder(tmp_path, "llama", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name]:
        scale = tensors[name].abs().amax(1) / 127
        tensors[scale_name(name)] = scale
        tensors[name] = (tensors[name] / scale[:, None]).round().half()
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(weights, "FORMATS", (Scaled(), *weights.FORMATS))
    return folder


def load(folder: Path, shard: Shard = WHOLE) -> dict[str, torch.Tensor]:
    return weights.load_weights(folder, load_spec(folder), "auto", torch.float32, shard=shard)


def test_a_format_with_tensors_of_its_own(scaled: Path) -> None:
    stored, loaded = load_file(scaled / "model.safetensors"), load(scaled)
    expected = [
        stored[f"model.layers.1.mlp.{role}_proj.weight"]
        * stored[f"model.layers.1.mlp.{role}_proj.scale"][:, None]
        for role in ("gate", "up")
    ]
    assert loaded["layers.1.gate_up"].equal(torch.cat(expected))
    assert loaded["layers.1.o"].equal(stored["model.layers.1.self_attn.o_proj.weight"])
    halves = [load(scaled, Shard(rank, 2)) for rank in range(2)]
    assert torch.cat([half["layers.1.down"] for half in halves], 1).equal(loaded["layers.1.down"])
    gates = [half["layers.1.gate_up"].chunk(2)[0] for half in halves]
    assert torch.cat(gates).equal(expected[0])


def test_its_tensors_are_checked_like_all_others(scaled: Path) -> None:
    name = "model.layers.1.mlp.up_proj.scale"
    tensors = load_file(scaled / "model.safetensors")
    scale = tensors.pop(name)
    save_file({**tensors, name: scale[:-1].contiguous()}, scaled / "model.safetensors")
    with pytest.raises(ModelFileError, match=rf"tensor {name} has shape \[159\], but .* asks for \[160\]"):
        load(scaled)
    save_file(tensors, scaled / "model.safetensors")
    # Gate and up are one tensor of the result, which is then not in this format as a whole.
    with pytest.raises(
        ModelFileError, match=r"tensor model\.layers\.1\.mlp\.gate_proj\.scale is there, but not"
    ):
        load(scaled)


def test_a_tensor_that_memory_is_short_of_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        NoMemoryError, match=r"m: no memory for embed \[1000000000000000\] \(2,000,000,000 MB\)"
    ):
        allocate(tmp_path / "m", "embed", (10**15,), torch.bfloat16, "cpu")
