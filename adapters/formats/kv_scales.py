"""Loads what a checkpoint says keys and values are divided by before they are cached in e4m3.

compressed-tensors stores `self_attn.k_scale` and `self_attn.v_scale` for each layer, ModelOpt
`self_attn.k_proj.k_scale` and `self_attn.v_proj.v_scale`: each a number.
"""

from __future__ import annotations

import math

import torch

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.checkpoints import Checkpoint, FolderCheckpoint
from microvllm.adapters.files.fields import warn_once
from microvllm.adapters.formats.dequantize import FLOATS


def scale_tensors(checkpoint: Checkpoint, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the keys' and the values' scale of each layer; {} if the checkpoint has none."""
    if not isinstance(checkpoint, FolderCheckpoint):
        return {}
    if checkpoint.quantization is None or not checkpoint.quantization.fp8_cache:
        return {}
    attention = checkpoint.names["o"].rpartition(".")[0]
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        for letter in "kv":
            module = attention.format(i=layer)
            names = (f"{module}.{letter}_scale", f"{module}.{letter}_proj.{letter}_scale")
            name = next(filter(checkpoint.find, names), names[0])
            stored = checkpoint.find(name)
            found[name] = (1,) if stored and stored.shape == (1,) else ()
    if not any(map(checkpoint.find, found)):
        warn_once(f"{checkpoint.path}: the scales of keys and values are not stored: they are 1")
        return {}
    return found


def load_scales(checkpoint: FolderCheckpoint, names: list[str]) -> torch.Tensor:
    """The tensors of `scale_tensors`: [layers, 2] float32. Raises `ModelFileError` for what is no scale."""
    scales = []
    for name in names:
        stored = checkpoint.find(name)
        if stored is None or stored.dtype not in FLOATS:
            raise ModelFileError(checkpoint.file_of(name), f"tensor {name} is not stored as a float")
        scale = checkpoint.view(name).float().item()
        if not 0 < scale < math.inf:
            raise ModelFileError(checkpoint.file_of(name), f"tensor {name} is {scale}, not a scale above 0")
        scales.append(scale)
    return torch.tensor(scales).view(-1, 2)
