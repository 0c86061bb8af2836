#!/usr/bin/env python3
"""Write a Hugging Face folder with its matrices quantised, as the tools that people use write them.

    python scripts/write_checkpoint.py smollm2-135m-instruct PLAIN --dtype bfloat16
    python scripts/quantize_checkpoint.py PLAIN TARGET --form gptq-4 --group-size 64

Every weight is rounded to the nearest value that its scale allows, without data for calibration. Embeddings
and the head stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E4M3 = torch.float8_e4m3fn
BLOCK = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each 4 bits of a word, from the lowest


class Written(NamedTuple):
    """The tensors of a module by the last part of their names, and the matrix that they stand for."""

    tensors: dict[str, Tensor]
    values: Tensor


class Form(NamedTuple):
    """A `quantization_config`, for a group size, and what writes a matrix [out, in] of float32."""

    config: Callable[[int], dict[str, Any]]
    write: Callable[[Tensor, int], Written]


# ---- 8-bit floating point ------------------------------------------------------------------------------


def write_fp8(weight: Tensor, block: tuple[int, int], shape: tuple[int, ...], **more: Tensor) -> Written:
    """Scales of `block` rows and columns, 0 for all, stored in `shape`; `more` are further tensors."""
    rows, columns = (size or length for size, length in zip(block, weight.shape, strict=True))
    scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    codes, values = torch.empty_like(weight, dtype=E4M3), torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[at].abs().max().clamp(min=1e-12) / torch.finfo(E4M3).max
            codes[at] = (weight[at] / scale[i, j]).to(E4M3)
            values[at] = codes[at].float() * scale[i, j]
    name = "weight_scale_inv" if block == (BLOCK, BLOCK) else "weight_scale"
    return Written({"weight": codes, name: scale.reshape(shape or scale.shape), **more}, values)


def write_int8(weight: Tensor, _: int) -> Written:
    """A scale for each row, symmetric."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    codes = (weight / scale).round().to(torch.int8)
    return Written({"weight": codes, "weight_scale": scale}, codes.float() * scale)


def fp8_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


# ---- integers in groups of columns ---------------------------------------------------------------------


class Codes(NamedTuple):
    """Unsigned codes [out, in], zero points and scales [out, groups], and the group of each column."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: Tensor
    group: np.ndarray[Any, Any]

    @property
    def values(self) -> Tensor:
        integers = self.codes.astype(np.int32) - self.zeros.astype(np.int32)[:, self.group]
        return torch.from_numpy(integers).float() * self.scales.float()[:, self.group]


def round_to_groups(
    weight: Tensor, bits: int, size: int, *, symmetric: bool, scale_dtype: torch.dtype, ordered: bool = False
) -> Codes:
    """`size` -1: all columns. With `ordered`, groups are of columns of similar size, wherever they are."""
    rows, columns = weight.shape
    size = columns if size == -1 else size
    group = np.arange(columns) // size
    if ordered:
        order = weight.norm(dim=0).argsort(descending=True).numpy()
        group[order] = np.arange(columns) // size
    count, top = -(-columns // size), (1 << bits) - 1
    scales = torch.empty(rows, count, dtype=scale_dtype)
    zeros = np.full((rows, count), 1 << bits - 1, dtype=np.uint32)
    for index in range(count):
        part = weight[:, torch.from_numpy(group == index)]
        if symmetric:
            scales[:, index] = (part.abs().amax(1).clamp(min=1e-6) / ((1 << bits - 1) - 0.5)).to(scale_dtype)
        else:
            low, high = part.amin(1).clamp(max=-1e-6), part.amax(1).clamp(min=1e-6)
            scales[:, index] = ((high - low) / top).to(scale_dtype)
            zeros[:, index] = (-low / scales[:, index].float()).round().clamp(1, top).numpy()
    codes = (weight / scales.float()[:, group]).round().numpy() + zeros[:, group]
    return Codes(codes.clip(0, top).astype(np.uint32), zeros, scales, group)


def pack(codes: np.ndarray[Any, Any], bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Along the last dimension, the first code in the lowest bits, or that at `order[0]`."""
    count = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % count)))
    words = np.zeros((codes.shape[0], padded.shape[1] // count), dtype=np.uint32)
    for place, column in enumerate(order or range(count)):
        words |= padded[:, column::count] << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32).copy())


def write_gptq(
    weight: Tensor,
    size: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    ordered: bool = False,
    version: int = 1,
) -> Written:
    made = round_to_groups(
        weight, bits, size, symmetric=symmetric, scale_dtype=torch.float16, ordered=ordered
    )
    tensors = {
        "qweight": pack(made.codes, bits).T.contiguous(),
        "qzeros": pack((made.zeros - (version == 1)).T.copy(), bits),
        "scales": made.scales.T.contiguous(),
        "g_idx": torch.from_numpy(made.group.astype(np.int32)),
    }
    return Written(tensors, made.values)


def gptq_config(size: int, *, bits: int = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": True, "desc_act": False, **more}


def write_awq(weight: Tensor, size: int) -> Written:
    made = round_to_groups(weight, 4, size, symmetric=False, scale_dtype=torch.float16)
    tensors = {
        "qweight": pack(made.codes.T.copy(), 4, AWQ_ORDER),
        "qzeros": pack(made.zeros.T.copy(), 4, AWQ_ORDER),
        "scales": made.scales.T.contiguous(),
    }
    return Written(tensors, made.values)


def awq_config(size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def write_packed(
    weight: Tensor, size: int, *, bits: int = 4, symmetric: bool = True, ordered: bool = False
) -> Written:
    made = round_to_groups(
        weight, bits, size, symmetric=symmetric, scale_dtype=torch.bfloat16, ordered=ordered
    )
    tensors = {
        "weight_packed": pack(made.codes, bits),
        "weight_scale": made.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(made.zeros.T.copy(), bits).T.contiguous()
    if ordered:
        tensors["weight_g_idx"] = torch.from_numpy(made.group.astype(np.int32))
    return Written(tensors, made.values)


def compressed_config(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def float_config(strategy: str, *, dynamic: bool = True) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    activations = {
        **weights,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
    }
    return compressed_config("float-quantized", weights, activations)


def packed_config(size: int, *, bits: int = 4, **more: Any) -> dict[str, Any]:
    strategy = "channel" if size == -1 else "group"
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": None if size == -1 else size,
        **more,
    }
    return compressed_config("pack-quantized", weights, None)


def int8_config(_: int) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return compressed_config("int-quantized", weights, {**weights, "strategy": "token", "dynamic": True})


def modelopt_config(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}


ACTIVATION = {"input_scale": torch.tensor(0.02)}

FORMS: dict[str, Form] = {
    "fp8": Form(lambda _: fp8_config(), lambda w, _: write_fp8(w, (0, 0), (1,))),
    "fp8-static": Form(
        lambda _: fp8_config(activation_scheme="static"),
        lambda w, _: write_fp8(w, (0, 0), (1,), **ACTIVATION),
    ),
    "fp8-block": Form(
        lambda _: fp8_config(weight_block_size=[BLOCK, BLOCK]), lambda w, _: write_fp8(w, (BLOCK, BLOCK), ())
    ),
    "compressed-fp8-tensor": Form(
        lambda _: float_config("tensor", dynamic=False), lambda w, _: write_fp8(w, (0, 0), (1,), **ACTIVATION)
    ),
    "compressed-fp8-channel": Form(lambda _: float_config("channel"), lambda w, _: write_fp8(w, (1, 0), ())),
    "compressed-int8": Form(int8_config, write_int8),
    "modelopt-fp8-channel": Form(
        lambda _: modelopt_config("FP8_PER_CHANNEL_PER_TOKEN"), lambda w, _: write_fp8(w, (1, 0), (-1,))
    ),
    "modelopt-fp8": Form(
        lambda _: modelopt_config("FP8"), lambda w, _: write_fp8(w, (0, 0), (1,), **ACTIVATION)
    ),
    "gptq-4": Form(gptq_config, write_gptq),
    "gptq-4-order": Form(
        lambda size: gptq_config(size, desc_act=True), lambda w, size: write_gptq(w, size, ordered=True)
    ),
    "gptq-4-asymmetric": Form(
        lambda size: gptq_config(size, sym=False), lambda w, size: write_gptq(w, size, symmetric=False)
    ),
    "gptq-4-v2": Form(
        lambda size: gptq_config(size, sym=False, checkpoint_format="gptq_v2"),
        lambda w, size: write_gptq(w, size, symmetric=False, version=2),
    ),
    "gptq-8": Form(lambda size: gptq_config(size, bits=8), lambda w, size: write_gptq(w, size, bits=8)),
    "awq": Form(awq_config, write_awq),
    "w4a16": Form(packed_config, write_packed),
    "w4a16-asymmetric": Form(
        lambda size: packed_config(size, symmetric=False),
        lambda w, size: write_packed(w, size, symmetric=False),
    ),
    "w4a16-order": Form(
        lambda size: packed_config(size, actorder="group"),
        lambda w, size: write_packed(w, size, ordered=True),
    ),
    "w8a16": Form(lambda size: packed_config(size, bits=8), lambda w, size: write_packed(w, size, bits=8)),
}


# Of experts, which no method's own writer quantises, whatever the configuration says of them.
ROUTERS = (
    ".mlp.gate.weight",
    ".block_sparse_moe.gate.weight",
    ".feed_forward.gate.weight",
    ".shared_expert_gate.weight",
    ".router.proj.weight",
)


def quantize_folder(source: Path, target: Path, form: str, group_size: int) -> dict[str, Tensor]:
    """Write `target`, and return the matrices that it stands for, by the names of `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".index.json")):
            shutil.copy(file, target / file.name)
    values: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if tensor.ndim != 2 or ".layers." not in name or name.endswith(ROUTERS):
                tensors[name] = tensor
                continue
            written = FORMS[form].write(tensor.float(), group_size)
            # save_file refuses tensors that share memory.
            tensors |= {
                f"{name.removesuffix('weight')}{suffix}": each.clone()
                for suffix, each in written.tensors.items()
            }
            values[name] = written.values
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = FORMS[form].config(group_size)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("target", type=Path, help="where to write: a new or an empty folder")
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--group-size", type=int, default=128, help="of the forms of 4 and 8 bit integers")
    args = parser.parse_args()
    if not (args.source / "config.json").exists():
        print(f"quantize_checkpoint: {args.source}: no config.json", file=sys.stderr)
        return 1
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        print(f"quantize_checkpoint: {args.target}: exists and is not an empty folder", file=sys.stderr)
        return 1
    quantize_folder(args.source, args.target, args.form, args.group_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
