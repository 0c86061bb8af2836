"""Rewrites the experts of a gpt-oss folder in MXFP4, by ggml's arithmetic, in the layout of its authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Tensors by name; None takes one away."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        path,
        metadata={"format": "pt"},
    )


def to_mxfp4(folder: Path, *, plain_layers: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """The folder's experts, but in those layers, in blocks and scales -> the values that these stand for.

    The values are those of the tensors that were there before, [E, in, out].
    """
    found: dict[str, Tensor | None] = {}
    rounded = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")) or int(name.split(".")[2]) in plain_layers:
            continue
        rows = tensor.transpose(1, 2).float().contiguous().numpy()
        stored = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.MXFP4)
        values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.MXFP4)
        rounded[name] = torch.from_numpy(values).view(rows.shape).transpose(1, 2).contiguous()
        each = stored.reshape(*rows.shape[:2], -1, 17)
        codes = each[..., 1:]
        # ggml has numbers 0 to 15 in the lower halves of its bytes, the authors every second one.
        nibbles = np.concatenate((codes & 15, codes >> 4), -1).reshape(*codes.shape[:-1], 16, 2)
        found[name] = None
        found[f"{name}_blocks"] = torch.from_numpy(nibbles[..., 0] | nibbles[..., 1] << 4)
        found[f"{name}_scales"] = torch.from_numpy(each[..., 0].copy())
    edit_tensors(folder, **found)
    plain = [f"model.layers.{layer}.mlp.experts" for layer in plain_layers]
    ignored = [*QUANTIZATION["modules_to_not_convert"], *plain]
    edit_config(folder, quantization_config={**QUANTIZATION, "modules_to_not_convert": ignored})
    return rounded
