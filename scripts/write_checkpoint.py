#!/usr/bin/env python3
"""Write a model's weights in another form, so that every engine can load the very same ones.

    python scripts/write_checkpoint.py model.gguf FOLDER --dtype bfloat16   # GGUF to a Hugging Face folder
    python scripts/write_checkpoint.py model.gguf other.gguf --dtype f16    # its matrices in another format
    python scripts/write_checkpoint.py CONFIG FOLDER --tokenizer FILE       # random weights

Quantised weights are written as the values that they stand for, rounded to `--dtype`. CONFIG is a folder with
a config.json and what else goes along (generation settings, chat template, tokenizer). FOLDER gets all of it
and weights drawn from N(0, 0.02), norms of ones, one file per layer. A random checkpoint that is there stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import BY_NAME, load_spec
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.tensors import Part, Slot
from microvllm.adapters.weights import load_weights
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.find_model import find_model
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.text.tokenizer_files import write_tokenizer

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
INDEX = "model.safetensors.index.json"
RANDOM_STD = 0.02  # as such models are initialised


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; errors are one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a .gguf file, a name such as smollm2-135m-instruct, or a folder")
    parser.add_argument("target", type=Path, help="where to write; an export needs a new or an empty folder")
    parser.add_argument("--dtype", default="bfloat16", choices=(*DTYPES, *DTYPES.values()))
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json for a configuration without one")
    args = parser.parse_args(arguments)
    dtype = next(name for name, short in DTYPES.items() if args.dtype in (name, short))
    try:
        source = find_model(args.source)
        if source.is_dir():
            write_random(source, args.target, dtype, args.tokenizer)
        elif args.target.suffix == ".gguf":
            convert_gguf(source, args.target, DTYPES[dtype])
        elif args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
            raise ConfigError(f"{args.target}: exists and is not an empty folder")
        else:
            export(source, args.target, dtype)
    except (ModelFileError, ConfigError, OSError) as error:
        print(f"write_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


def _slots(spec: ModelSpec) -> Iterator[Slot]:
    return spec.slots(BY_NAME[spec.architecture].hf_tensors)


def hf_name(spec: ModelSpec, part: Part, layer: int) -> str:
    """The name of a tensor in a Hugging Face checkpoint."""
    name = BY_NAME[spec.architecture].hf_tensors[part.role].format(i=layer, e=part.expert)
    return f"{name}.{'bias' if part.bias else 'weight'}"


# ---- random weights ----------------------------------------------------------------------------------


def write_random(config: Path, folder: Path, dtype: str, tokenizer: Path | None = None) -> None:
    """Write a checkpoint of random weights; at most one layer is in memory at a time."""
    if (folder / INDEX).exists():  # written last
        return
    if any(config.glob("*.safetensors")):
        raise ConfigError(f"{config}: holds weights already, so none are made for it")
    spec = load_spec(config)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*filter(Path.is_file, config.iterdir()), *([tokenizer] if tokenizer else [])]:
        shutil.copy(file, folder / file.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    layers = itertools.groupby(_slots(spec), lambda slot: (slot.name.split(".")[0], slot.layer))
    for number, (_, slots) in enumerate(layers):
        tensors = {}
        for slot in slots:
            for part in slot.parts:
                tensor = torch.ones(slot.stored_shape(part), dtype=getattr(torch, dtype))
                if "norm" not in part.role:
                    tensor = (torch.randn_like(tensor, device=device) * RANDOM_STD).cpu()
                tensors[hf_name(spec, part, slot.layer)] = tensor
        file_name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    print(f"{folder}: {total / 1e9:.2f} GB of random weights")


# ---- a GGUF file in other forms ----------------------------------------------------------------------


def export(model: Path, folder: Path, dtype: str) -> None:
    """Write all files; `model` is a GGUF file, `dtype` the name of a torch dtype."""
    spec = load_spec(model)
    if isinstance(spec.layers[0].mlp, Experts) and spec.architecture == "llama":  # GGUF's name of both
        spec = msgspec.structs.replace(spec, architecture="mixtral")
    tokenizer = Tokenizer.load(model)
    tensors = _unfuse(spec, load_weights(model, spec, "gguf", getattr(torch, dtype)))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(spec, dtype))
    ends = list(spec.eos_token_ids)
    generation = {"bos_token_id": spec.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    _write_json(folder / "generation_config.json", generation)
    write_tokenizer(tokenizer, folder, spec.max_position)


def _unfuse(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut the fused tensors into those of a Hugging Face checkpoint, emptying `weights` on the way."""
    tensors = {}
    for slot in _slots(spec):
        pieces = torch.split(weights.pop(slot.name), [part.rows.size for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            # save_file wants tensors that share no storage.
            tensors[hf_name(spec, part, slot.layer)] = piece.clone()
    return tensors


def _config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    family, attention, mlp = spec.architecture, spec.layers[0].mixer, spec.layers[0].mlp
    if family == "llama" and attention.window is not None:
        family = "mistral"  # the same model, of which only Mistral's class knows a window
    rope = attention.rope
    scaling: dict[str, Any] | None = None
    max_position = spec.max_position
    if rope.scaling == "linear":
        scaling = {"rope_type": "linear", "factor": rope.factor}
        max_position = round(max_position / rope.factor)
    elif rope.scaling == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    ends = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "architectures": [BY_NAME[family].hf_class],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": mlp.size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": max_position,
        # GGUF holds it in float32, where 1e-5 is 0.00000999999975.
        "rms_norm_eps": float(f"{spec.rms_norm_eps:.7g}"),
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "torch_dtype": dtype,
    }
    if isinstance(mlp, Experts):
        count = "num_local_experts" if family == "mixtral" else "num_experts"
        config |= {count: mlp.count, "num_experts_per_tok": mlp.routing.num_chosen}
    if family == "qwen3_moe":
        config |= {"moe_intermediate_size": mlp.size, "norm_topk_prob": True}
    if family in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = attention.qkv_bias
    if family == "llama":
        config["mlp_bias"] = mlp.bias
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = attention.window
    if family in ("qwen2", "qwen3") and attention.window is not None:
        config |= {"use_sliding_window": True, "sliding_window": attention.window, "max_window_layers": 0}
    return config


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
