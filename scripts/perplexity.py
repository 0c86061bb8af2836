#!/usr/bin/env python3
"""Perplexity of a text under a model, for each way of keeping the weights of a .gguf file.

The text is cut into windows; each is a prompt whose log probabilities the engine gives back. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from microvllm import LLM, SamplingParams

WAYS = ({"gguf_weights": "packed"}, {"gguf_weights": "dequantized"})


def log_probabilities(llm: LLM, windows: list[list[int]]) -> list[float]:
    """Of every token of every window but its first."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for window, output in zip(windows, llm.generate(windows, params, use_tqdm=False), strict=True):
        entries = (output.prompt_logprobs or [])[1:]
        for token, entry in zip(window[1:], entries, strict=True):
            if entry is not None:
                found.append(entry[token].logprob)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--dtype", default="auto", help="of the KV cache and of dequantized weights")
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    print("| weights | tokens | perplexity |\n|---|---|---|")
    for way in WAYS:
        llm = LLM(args.model, dtype=args.dtype, **way)
        ids = llm.get_tokenizer().encode(text)
        windows = [ids[at : at + args.window] for at in range(0, len(ids) - 1, args.window)]
        found = log_probabilities(llm, [window for window in windows if len(window) > 1])
        perplexity = math.exp(-sum(found) / len(found))
        print(f"| {way['gguf_weights']} | {len(found)} | {perplexity:.4f} |", flush=True)


if __name__ == "__main__":
    main()
