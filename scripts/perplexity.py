#!/usr/bin/env python3
"""Measures the perplexity of a text for each way of multiplying with the weights of a .gguf file.

Or for a folder and for others that are quantised from it: `--model PLAIN --beside FP8 GPTQ`. Or for types of
the KV cache: `--kv-cache-dtype auto fp8`, on a CPU by the torch backend. Or for what loading quantises to:
`--model PLAIN --quantization none fp8_per_channel`. With `--round 128` the last of them once more with what
its products multiply rounded to e4m3, by the largest of each 128 columns of a token, as a GPU multiplies FP8
in blocks (W8A8); the embeddings and the head excepted.

The text is cut into windows; each is a prompt whose log probabilities the engine gives back. Prints Markdown:
the last column is how much larger the perplexity is than that of the first row, and two standard errors of
that. The text that comes with the script is of 1776; models may know parts of it by heart, in all rows alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from microvllm import LLM, SamplingParams
from microvllm.ops.operators import Linear, TorchOperators
from microvllm.ops.scaled import expand, quantize

WAYS = {
    "packed, exact": {"gguf_weights": "packed"},
    "dequantized to --dtype": {"gguf_weights": "dequantized"},
    "packed, int8 activations": {"gguf_weights": "packed", "cpu_activations": "int8"},
}


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


class RoundedLinear(Linear):
    """A product with x rounded to e4m3 by groups of columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: int) -> None:
        super().__init__(weight, bias)
        self._block = (1, group)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        codes, scales = quantize(x, self._block)
        rounded = codes.float() * expand(scales, self._block, *x.shape)
        return super().__call__(rounded.to(x.dtype), residual)


def round_activations(model: Path, group: int) -> None:
    """From now on the torch operators round what is multiplied, but in front of the head."""
    head = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]

    def linear(self: TorchOperators, weight: Tensor, bias: Tensor | None = None) -> Any:
        return Linear(weight, bias) if len(weight) == head else RoundedLinear(weight, bias, group)

    TorchOperators.linear = linear  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path(__file__).with_suffix(".txt"))
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--dtype", default="auto", help="of the KV cache and of dequantized weights")
    parser.add_argument(
        "--beside", nargs="*", default=[], help="folders to compare with --model, each as it is"
    )
    parser.add_argument("--attention-backend", default="torch", help="with --kv-cache-dtype")
    parser.add_argument("--kv-cache-dtype", nargs="*", default=[], help="types to compare on --model")
    parser.add_argument("--quantization", nargs="*", default=[], help="of the plain --model, on loading")
    parser.add_argument(
        "--round", type=int, help="columns of a token that share a scale, with --quantization"
    )
    args = parser.parse_args()
    if args.round is not None and (args.round < 1 or not args.quantization):
        parser.error("--round: needs --quantization, and a number above 0")
    rows = [(name, args.model, way) for name, way in WAYS.items()]
    if args.beside:
        rows = [(Path(model).name, model, {}) for model in (args.model, *args.beside)]
    if args.quantization:
        names = {name: None if name == "none" else name for name in args.quantization}
        rows = [(name, args.model, {"quantization": value}) for name, value in names.items()]
        if args.round:
            rows = [(name, model, {**way, "attention_backend": "torch"}) for name, model, way in rows]
            name, model, way = rows[-1]
            rows.append((f"{name}, activations in e4m3 by {args.round} columns", model, way))
    if args.kv_cache_dtype:
        ways = [
            {"kv_cache_dtype": dtype, "attention_backend": args.attention_backend}
            for dtype in args.kv_cache_dtype
        ]
        rows = [(f"cache {way['kv_cache_dtype']}", args.model, way) for way in ways]
    text = args.text.read_text("utf-8")
    print("| weights | tokens | perplexity | beside the first |\n|---|---|---|---|")
    exact: list[float] = []
    for index, (name, model, way) in enumerate(rows):
        if args.round and index == len(rows) - 1:
            round_activations(Path(model), args.round)
        llm = LLM(model, dtype=args.dtype, **way)
        ids = llm.get_tokenizer().encode(text)
        windows = [ids[at : at + args.window] for at in range(0, len(ids) - 1, args.window)]
        found = log_probabilities(llm, [window for window in windows if len(window) > 1])
        exact = exact or found
        changes = [before - after for before, after in zip(exact, found, strict=True)]
        error = 2 * statistics.stdev(changes) / math.sqrt(len(changes))
        change = f"{100 * math.expm1(statistics.fmean(changes)):+.2f} % ± {100 * error:.2f} %"
        perplexity = math.exp(-statistics.fmean(found))
        print(f"| {name} | {len(found)} | {perplexity:.4f} | {change} |", flush=True)


if __name__ == "__main__":
    main()
