"""A small random Qwen-1 folder, its logits computed in plain torch, and its tokens as tiktoken defines them.

transformers has no class of this family, so the reference is written from the description of the
architecture alone, over the checkpoint's own names; it shares nothing with the engine.
"""

from __future__ import annotations

import base64
import collections
import itertools
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB_SIZE = 640
SEQ_LENGTH = 160
# Values of Qwen-7B-Chat's own file, but for the sizes.
SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": True,
    "hidden_size": 96,
    "intermediate_size": 208,
    "initializer_range": 0.02,
    "kv_channels": 24,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": SEQ_LENGTH,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": VOCAB_SIZE,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
CORPUS = (
    "the quick brown fox jumps over the lazy dog; the engine schedules the requests, and the cache keeps "
    "the keys and the values. system user assistant You are a helpful assistant. 你好世界。你好吗。 it's 'S é"
)
WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_folder(path: Path, *, chat: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """config.json, generation_config.json, model.safetensors and qwen.tiktoken."""
    config = {**SMALL_CONFIG, **overrides}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    generation = {"chat_format": "chatml" if chat else "raw", "eos_token_id": len(ranks()), "top_p": 0.8}
    (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}', "utf-8")
    write_ranks(path / "qwen.tiktoken")
    save_file(random_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Under the checkpoint's names. Scales make greedy text varied, as in tiny_models.py."""
    hidden, width = config["hidden_size"], config["intermediate_size"] // 2
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {
        "transformer.wte.weight": 0.2 * noise(config["vocab_size"], hidden),
        "transformer.ln_f.weight": 1 + 0.2 * noise(hidden),
        "lm_head.weight": noise(config["vocab_size"], hidden) * 1.5 / math.sqrt(hidden),
    }
    linears = {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (width, hidden),
        "mlp.w2": (width, hidden),
        "mlp.c_proj": (hidden, width),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}."
        for name, (rows, columns) in linears.items():
            weights[f"{at}{name}.weight"] = noise(rows, columns) * 1.5 / math.sqrt(columns)
            if name == "attn.c_attn" or not config["no_bias"]:
                weights[f"{at}{name}.bias"] = 0.3 * noise(rows)
        for name in ("ln_1", "ln_2"):
            weights[f"{at}{name}.weight"] = 1 + 0.2 * noise(hidden)
    return weights


@torch.inference_mode()
def reference_logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """[len(ids), vocab] float32 for a text of at most `seq_length` tokens."""
    heads, size, count = config["num_attention_heads"], config["kv_channels"], len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    angles = torch.outer(
        torch.arange(count).float(),
        config["rotary_emb_base"] ** -(torch.arange(0, size, 2).float() / size),
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [count, 1, size / 2]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    hidden = weights["transformer.wte.weight"][ids]
    later = torch.ones(count, count).triu(1).bool()
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}."
        fused = linear(norm(hidden, f"{at}ln_1"), f"{at}attn.c_attn")
        q, k, v = (part.view(count, heads, size) for part in fused.chunk(3, dim=-1))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(size)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), v)
        hidden = hidden + linear(mixed.reshape(count, -1), f"{at}attn.c_proj")
        x = norm(hidden, f"{at}ln_2")
        gated = linear(x, f"{at}mlp.w1") * torch.nn.functional.silu(linear(x, f"{at}mlp.w2"))
        hidden = hidden + linear(gated, f"{at}mlp.c_proj")
    return linear(norm(hidden, "transformer.ln_f"), "lm_head")


# ---- the tokenizer ---------------------------------------------------------------------------------


def ranks() -> dict[bytes, int]:
    """A small vocabulary made by byte-pair encoding: bytes first, as in Qwen's from "!" on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    table = {bytes([byte]): rank for rank, byte in enumerate(order)}
    words = [[bytes([byte]) for byte in word.encode()] for word in WORDS.findall(CORPUS)]
    while any(len(word) > 1 for word in words):
        counts = collections.Counter(
            left + right for word in words for left, right in itertools.pairwise(word)
        )
        best = max(counts, key=lambda token: (counts[token], token))
        table.setdefault(best, len(table))
        for word in words:
            _merge(word, best)
    return table


def _merge(word: list[bytes], token: bytes) -> None:
    index = 0
    while index < len(word) - 1:
        if word[index] + word[index + 1] == token:
            word[index : index + 2] = [token]
        index += 1


def write_ranks(file: Path, lines: list[str] | None = None) -> None:
    if lines is None:
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items()]
    file.write_text("\n".join(lines) + "\n", "ascii")


def reference_ids(table: dict[bytes, int], text: str) -> list[int]:
    """Qwen's tokenizer class over tiktoken: NFC, special tokens, words, then always the lowest rank."""
    ids: list[int] = []
    for piece in regex.split(
        r"(<\|(?:endoftext|im_start|im_end|extra_\d+)\|>)", unicodedata.normalize("NFC", text)
    ):
        if piece in SPECIAL:
            ids.append(len(table) + SPECIAL.index(piece))
            continue
        for word in WORDS.findall(piece):
            data = word.encode()
            parts = [data] if data in table else [data[i : i + 1] for i in range(len(data))]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: table.get(parts[i] + parts[i + 1], 1 << 30))
                if parts[best] + parts[best + 1] not in table:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [table[part] for part in parts]
    return ids
