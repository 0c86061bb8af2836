#!/usr/bin/env python3
"""Checks that `--batch-invariant` keeps every answer to the last bit, and measures what it costs.

    python scripts/check_invariance.py [--prompts 1000] [--max-tokens 128] [--model smollm2-135m-instruct]

Greedy requests for prompts cut from a text run alone, then in other ways, with the option and without it in
turns. Prints Markdown: how many answers have the tokens of the prompt alone, and of those with the option,
how many have the same bits of log probabilities, too; and tokens a second: on a CPU for each second of
processor time, which other processes disturb least. `--first` and `--prompts` cut the 1,000 into parts that
can run side by side. Ends with 1 unless all with the option have the same bits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from bench.servers import serving

from microvllm import LLM, SamplingParams

TEXT = Path(__file__).with_name("perplexity.txt")
ON_GPU = torch.cuda.is_available()
CLOCK = time.perf_counter if ON_GPU else time.process_time
LONGEST = 200  # tokens of a prompt
SLICE = 64  # prompts of one turn
BLOCKS = 40 if ON_GPU else 80  # of 64 tokens on a GPU and 16 on a CPU: too few for all
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "batch of 8": {"max_num_seqs": 8},
    "batch of 64": {"max_num_seqs": 64},
    "chunks of 24": {"max_num_seqs": 16, "long_prefill_token_threshold": 24},
    "prefix hit": {"max_num_seqs": 16, "enable_prefix_caching": True},
    "preempted": {"max_num_seqs": 64, "num_gpu_blocks_override": BLOCKS},
}

Answer = list[tuple[int, float]]


class Run:
    """One way of running the prompts, with the option or without it."""

    def __init__(self, args: argparse.Namespace, way: dict[str, Any], invariant: bool) -> None:
        options = {"enable_prefix_caching": False, "max_model_len": 1024, "batch_invariant": invariant, **way}
        if ON_GPU:  # both runs are in its memory at once
            options.setdefault("num_gpu_blocks_override", 1024)
        self.llm = LLM(
            args.model,
            dtype=args.dtype,
            cpu_activations=args.cpu_activations,
            load_format=args.load_format,
            **options,
        )
        self.warms = options["enable_prefix_caching"]
        self.params = SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=0)
        self.answers: list[Answer] = []
        self.tokens, self.seconds = 0, 0.0

    def generate(self, prompts: list[list[int]]) -> None:
        if self.warms:
            self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        begin = CLOCK()
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        self.seconds += CLOCK() - begin
        for output in outputs:
            (answer,) = output.outputs
            entries = zip(answer.token_ids, answer.logprobs or [], strict=True)
            self.answers.append([(token, entry[token].logprob) for token, entry in entries])
            self.tokens += len(answer.token_ids)

    def count(self, metric: str) -> float:
        return sum(getattr(one, "value", 0) for one in self.llm.get_metrics() if one.name == metric)


class Client:
    """Asks a server that is started for it, over HTTP, eight at once: whole and streamed in turns."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._flags = ["--batch-invariant", "--max-model-len", "1024", "--load-format", args.load_format]
        self._flags += ["--dtype", args.dtype, "--cpu-activations", args.cpu_activations]
        self._model, self._max_tokens = args.model, args.max_tokens

    def answers(self, prompts: list[list[int]]) -> list[Answer]:
        with serving(self._model, *self._flags) as server, httpx.Client(timeout=600) as client:
            url = f"http://127.0.0.1:{server.port}/v1/completions"

            def ask(numbered: tuple[int, list[int]]) -> Answer:
                number, prompt = numbered
                body = {
                    **{"prompt": prompt, "temperature": 0, "max_tokens": self._max_tokens, "logprobs": 0},
                    **{"return_token_ids": True, "stream": number % 2 == 1},
                }
                reply = client.post(url, json=body).raise_for_status()
                events = [reply.text]
                if body["stream"]:
                    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
                answer: Answer = []
                for choice in (choice for event in events for choice in json.loads(event)["choices"]):
                    answer += zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
                return answer

            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(ask, enumerate(prompts)))


def tokens(answer: Answer) -> list[int]:
    return [token for token, _ in answer]


def cut_prompts(llm: LLM, count: int) -> list[list[int]]:
    """Pieces of the text, of 1 to `LONGEST` tokens."""
    ids, chosen = llm.get_tokenizer().encode(TEXT.read_text("utf-8")), random.Random(1)
    lengths = [chosen.randint(1, LONGEST) for _ in range(count)]
    starts = [chosen.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--without-fast", action="store_true", help="run with the option only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-activations", default="float32")
    args = parser.parse_args()
    prompts: list[list[int]] = []
    alone: list[list[Answer]] = []
    worst = args.prompts
    print("| way | same tokens, fast | same bits, invariant | tokens/s, fast | tokens/s, invariant | cost |")
    print("|---|---|---|---|---|---|")
    for name, way in WAYS.items():
        runs = [Run(args, way, invariant) for invariant in (False, True)[args.without_fast :]]
        prompts = prompts or cut_prompts(runs[0].llm, args.first + args.prompts)[args.first :]
        for turn, begin in enumerate(range(0, args.prompts, SLICE)):
            for run in runs[:: -1 if turn % 2 else 1]:
                run.generate(prompts[begin : begin + SLICE])
        alone = alone or [run.answers for run in runs]
        invariant = sum(one == first for one, first in zip(runs[-1].answers, alone[-1], strict=True))
        speeds = [run.tokens / run.seconds for run in runs]
        fast, fast_speed, cost = "", "", ""
        if not args.without_fast:
            same = sum(
                tokens(one) == tokens(first) for one, first in zip(runs[0].answers, alone[0], strict=True)
            )
            fast, fast_speed = f"{same} of {args.prompts}", f"{speeds[0]:.0f}"
            cost = f"{100 * (1 - speeds[1] / speeds[0]):.1f} %"
        shares = f"{fast} | {invariant} of {args.prompts}"
        print(f"| {name} | {shares} | {fast_speed} | {speeds[-1]:.0f} | {cost} |", flush=True)
        hits, preempted = (
            runs[-1].count(f"vllm:{what}") for what in ("prefix_cache_hits", "num_preemptions")
        )
        if (name == "prefix hit" and not hits) or (name == "preempted" and not preempted):
            print(f"no request was a {name}")
            worst = 0
        worst = min(worst, invariant)
    for name in ("over HTTP", "from a server started again"):
        found = Client(args).answers(prompts)
        same = sum(one == first for one, first in zip(found, alone[-1], strict=True))
        print(f"| {name} | | {same} of {args.prompts} | | | |", flush=True)
        worst = min(worst, same)
    return int(worst < args.prompts)


if __name__ == "__main__":
    sys.exit(main())
