#!/usr/bin/env python3
"""Write a GGUF model as a Hugging Face folder, so that transformers and vLLM can load the very same weights.

    python scripts/write_checkpoint.py smollm2-135m-instruct /path/to/folder --dtype bfloat16

Quantised weights are written as the values that they stand for, rounded to `--dtype`. The folder gets
config.json, model.safetensors, tokenizer.json, tokenizer_config.json (with the chat template) and
generation_config.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import BY_NAME, load_spec
from microvllm.adapters.spec import ModelSpec
from microvllm.adapters.weights import checkpoint_slots, load_weights
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.find_model import find_model
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.text.tokenizer_files import write_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; errors are one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a .gguf file, or a name such as smollm2-135m-instruct")
    parser.add_argument("folder", type=Path, help="where to write; must be empty or not exist")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(arguments)
    try:
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise ConfigError(f"{args.folder}: exists and is not an empty folder")
        export(find_model(args.model), args.folder, args.dtype)
    except (ModelFileError, ConfigError, OSError) as error:
        print(f"write_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


def export(model: Path, folder: Path, dtype: str) -> None:
    """Write all files; `model` is a GGUF file, `dtype` the name of a torch dtype."""
    if not model.is_file():
        raise ConfigError(f"{model}: is not a GGUF file")
    spec = load_spec(model)
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
    tensors, names = {}, BY_NAME[spec.architecture].hf_tensors
    for slot in checkpoint_slots(spec):
        pieces = torch.split(weights.pop(slot.name), [part.rows for part in slot.parts])
        for part, piece in zip(slot.parts, pieces, strict=True):
            suffix = "bias" if part.bias else "weight"
            # save_file wants tensors that share no storage.
            tensors[f"{names[part.role].format(i=slot.layer)}.{suffix}"] = piece.clone()
    return tensors


def _config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json in the spelling that transformers 4 and 5 both read."""
    family = spec.architecture
    if family == "llama" and spec.sliding_window is not None:
        family = "mistral"  # the same model, of which only Mistral's class knows a window
    rope = spec.rope
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
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
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
    if family in ("llama", "qwen3"):
        config["attention_bias"] = spec.qkv_bias
    if family == "llama":
        config["mlp_bias"] = spec.mlp_bias
    if family == "mistral":
        config["sliding_window"] = spec.sliding_window
    if family in ("qwen2", "qwen3") and spec.sliding_window is not None:
        config |= {"use_sliding_window": True, "sliding_window": spec.sliding_window, "max_window_layers": 0}
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
