#!/usr/bin/env python3
"""Write the greedy tokens that transformers gives for SmolLM2-135M-Instruct: what ours are held against.

    python scripts/reference_tokens.py tests/data/smollm2_greedy.json

The weights are read from the demo model's GGUF file with the `gguf` package alone, so nothing of microvllm's
loader or decoder takes part (its tokenizer turns the prompts into ids). Every prompt is run alone, in
float32, with plain attention, for NUM_TOKENS tokens whatever they are. Takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers

from microvllm.runtime.options.find_model import DEMO_MODEL, find_model
from microvllm.runtime.text.tokenizer import Tokenizer

NUM_TOKENS = 64
MARGIN_SHOWN = 0.01  # smaller differences between the best two logits are written down

TEXTS = (
    "The capital of France is",
    "Hello",
    "A",
    " ",
    "\n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "2 + 2 =",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, age FROM users WHERE",
    "<html>\n<body>\n<h1>",
    '{"name": "Alice", "age": 30, "city": "',
    "#include <stdio.h>\n\nint main(void) {\n",
    "fn main() {\n    let mut v = Vec::new();\n",
    "Once upon a time, in a land far away,",
    "It was a bright cold day in April, and the clocks were",
    "To be, or not to be, that is",
    "Roses are red, violets are",
    "The theory of relativity says that",
    "Photosynthesis is the process by which",
    "Water boils at 100 degrees",
    "The mitochondria is the",
    "In 1969, the first man on the moon",
    "The three laws of thermodynamics are:\n1.",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n-",
    "Dear Sir or Madam,\n\nI am writing to",
    "Breaking news: scientists have discovered",
    "Q: What is the largest planet in the solar system?\nA:",
    "Translate to French: Good morning ->",
    "Bonjour, je m'appelle",
    "Der schnelle braune Fuchs springt",
    "El perro corre por",
    "Il était une fois",
    "Привет, как",
    "今日は天気が",
    "你好，世界",  # noqa: RUF001
    "안녕하세요",
    "Γειά σου Κόσμε",  # noqa: RUF001
    "🙂🙃🎉 emojis are",
    "naïve café façade",
    "The the the the the the the the",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "0123456789 0123456789 0123456789",
    "THIS TEXT IS WRITTEN IN CAPITALS AND",
    "x^2 + 2x + 1 = 0. Solve for x:",
    "| Name | Age |\n|---|---|\n| Bob | 41 |\n|",
    "https://www.example.com/",
    "She sells sea shells by the sea shore. " * 12,
    "The quick brown fox jumps over the lazy dog. " * 30 + "And then",
    "".join(f"{i}: the square of {i} is {i * i}.\n" for i in range(1, 60)),
    " ".join(f"word{i}" for i in range(150)),
    "A long list of animals: " + ", ".join(("cat", "dog", "cow", "pig", "hen", "fox", "owl", "ant") * 20),
)
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "How do I sort a list in Python?",
    "Tell me a joke.",
    "What is 17 times 3?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Summarize: The cat sat on the mat because it was warm and quiet there.",
    "Qu'est-ce que la photosynthèse ?",
    "List the days of the week.",
    "Is the earth flat?",
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (*TEXTS, *(CHAT.format(question) for question in QUESTIONS))


class Greedy(NamedTuple):
    """`margins[i]`: the best logit of position i less the second best."""

    tokens: list[int]
    margins: list[float]


def transformers_model(path: Path) -> Any:
    """The Llama model of a GGUF file as transformers' LlamaForCausalLM in float32."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(f"llama.{key}")
        return None if field is None else field.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, tensor in tensors.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem = name.removesuffix(".weight")
        if stem in top:
            target = top[stem]
        else:
            _, layer, role = stem.split(".")
            target = f"model.layers.{layer}.{names[role]}"
            if role in ("attn_q", "attn_k"):
                # llama.cpp keeps the two halves of a head interleaved, transformers one after the other.
                count = heads if role == "attn_q" else kv_heads
                paired = values.reshape(count, -1, 2, values.shape[-1])
                values = paired.swapaxes(1, 2).reshape(values.shape)
        state[f"{target}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{path}: tensors do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompt_ids: list[int], num_tokens: int) -> Greedy:
    """`num_tokens` greedy tokens after a prompt; end-of-sequence tokens do not end it."""
    result = Greedy([], [])
    cache = None
    inputs = torch.tensor([prompt_ids])
    for _ in range(num_tokens):
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best, second = output.logits[0, -1].topk(2).values.tolist()
        token = int(output.logits[0, -1].argmax())
        result.tokens.append(token)
        result.margins.append(best - second)
        inputs = torch.tensor([[token]])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    path = find_model(DEMO_MODEL)
    tokenizer = Tokenizer.load(path)
    model = transformers_model(path)
    cases = []
    for number, prompt in enumerate(PROMPTS, 1):
        ids = tokenizer.encode(prompt)
        result = greedy(model, ids, NUM_TOKENS)
        near = {str(i): round(m, 6) for i, m in enumerate(result.margins) if m < MARGIN_SHOWN}
        cases.append({"prompt_token_ids": ids, "token_ids": result.tokens, "near_ties": near})
        print(f"{number}/{len(PROMPTS)} {tokenizer.decode(result.tokens)[:60]!r}", file=sys.stderr)
    header = {
        "model": path.name,
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "dtype": "float32",
        "near_ties": f"position: best logit less the second best, where below {MARGIN_SHOWN}",
    }
    lines = ",\n".join(json.dumps(case) for case in cases)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(header)[:-1] + ', "cases": [\n' + lines + "\n]}\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
