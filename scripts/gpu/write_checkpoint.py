"""Writes a checkpoint of random weights that any engine loads: randn * 0.02 in bfloat16, norms of ones.

    python scripts/gpu/write_checkpoint.py CONFIG_FOLDER FOLDER [--tokenizer tokenizer.json]

CONFIG_FOLDER holds config.json of a Qwen2 or Qwen3 model and what else goes along (generation settings, the
chat template); FOLDER gets all of it, the tokenizer, and the weights under Hugging Face's names. What is
there already stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SCALE = 0.02  # of the weights, as such models are initialised


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """(file stem, {tensor: shape}): a file for each layer, and one for the rest."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    qwen3 = config["model_type"] == "qwen3"
    rest: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        rest["lm_head.weight"] = (config["vocab_size"], hidden)
    yield "model-rest", rest
    for i in range(config["num_hidden_layers"]):
        attention: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (heads * dim, hidden),
            "k_proj.weight": (kv_heads * dim, hidden),
            "v_proj.weight": (kv_heads * dim, hidden),
            "o_proj.weight": (hidden, heads * dim),
        }
        if qwen3:
            attention |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
        else:
            attention |= {
                f"{name}_proj.bias": (n * dim,)
                for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            }
        layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= {f"mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (hidden, width)
        layer |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        yield f"model-layer-{i:02}", {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configuration", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    index = args.folder / "model.safetensors.index.json"
    if index.exists():  # written last
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    sources = [*args.configuration.iterdir(), *([args.tokenizer] if args.tokenizer else [])]
    for source in sources:
        shutil.copy(source, args.folder / source.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    places, total = {}, 0
    for stem, tensors in shapes(json.loads((args.folder / "config.json").read_text())):
        made = {}
        for name, shape in tensors.items():
            if name.endswith("norm.weight"):
                made[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                made[name] = (torch.randn(shape, dtype=torch.bfloat16, device=device) * SCALE).cpu()
            total += made[name].nbytes
            places[name] = f"{stem}.safetensors"
        save_file(made, args.folder / f"{stem}.safetensors", metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    print(f"{args.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
