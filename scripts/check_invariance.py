#!/usr/bin/env python3
"""Checks that `--batch-invariant` keeps every answer to the last bit, and measures what it costs.

    python scripts/check_invariance.py [--prompts 1000] [--max-tokens 128] [--jobs 4] [--shard 1/2]
    python scripts/check_invariance.py --add-up FILE ...

Greedy requests for prompts cut from a text run alone, then in other ways, with the option and without it in
turns. The work is cut into parts of a way and at most 64 prompts; each runs in an engine of its own, `--jobs`
of them side by side, one thread each. `--shard 2/3` takes the second of three shares of the prompts; `--out`
appends each part to a file as it ends, and runs no part again that is in it: an interrupted proof goes on.
`--add-up` prints the table of such files, so that it can be made on several machines of one kind, too.

Prints Markdown: how many answers have the tokens of the prompt alone, and of those with the option, how many
have the same bits of log probabilities, too; and tokens a second: on a CPU for each second of processor
time, which other processes disturb least. Ends with 1 unless every prompt was compared in every way, and all
with the option have the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
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
PART = 64  # prompts of a part
ALONE_PART = PART if ON_GPU else 16  # a prompt alone takes longest
BLOCKS = 40 if ON_GPU else 80  # of 64 tokens on a GPU and 16 on a CPU: too few for all
ALONE, HIT, PREEMPTED = "alone", "prefix hit", "preempted"
HTTP, RESTARTED = "over HTTP, every other streamed", "from a server started again, the others streamed"
WAYS: dict[str, dict[str, Any]] = {
    ALONE: {"max_num_seqs": 1},
    **{f"batch of {size}": {"max_num_seqs": size} for size in (2, 4, 8, 16, 32, 64)},
    **{f"chunks of {n}": {"max_num_seqs": 16, "long_prefill_token_threshold": n} for n in (1, 5, 16, 24, 90)},
    HIT: {"max_num_seqs": 16, "enable_prefix_caching": True},
    PREEMPTED: {"max_num_seqs": 64, "num_gpu_blocks_override": BLOCKS},
}
HTTP_ALONE, HTTP_AGAIN = "over HTTP one by one, streamed", "over HTTP on prefix hits, every other streamed"
HTTP_PREEMPTED = "over HTTP after preemption, streamed"
SERVED = (HTTP, RESTARTED, HTTP_ALONE, HTTP_AGAIN, HTTP_PREEMPTED)
EVERY_WAY = (*WAYS, *SERVED)
FAST, INVARIANT = "fast", "invariant"

Answer = list[tuple[int, float]]


@dataclass
class Mode:
    """The answers of a part with the option or without it; each as (digest of its tokens, of its bits)."""

    digests: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0
    preemptions: int = 0


@dataclass
class Part:
    """One way of running the prompts from number `first` on, and what came of it; `of`: the options."""

    way: str
    first: int
    count: int
    modes: dict[str, Mode] = field(default_factory=dict)
    of: str = ""

    @classmethod
    def read(cls, line: str) -> Part:
        stored = json.loads(line)
        modes = {name: Mode(**mode) for name, mode in stored.pop("modes").items()}
        return cls(**stored, modes=modes)


def digest(answer: Answer) -> tuple[str, str]:
    tokens = struct.pack(f"{len(answer)}q", *(token for token, _ in answer))
    bits = struct.pack(f"{len(answer)}d", *(value for _, value in answer))
    return hashlib.sha256(tokens).hexdigest()[:16], hashlib.sha256(tokens + bits).hexdigest()[:16]


def run(args: argparse.Namespace, part: Part, mode: str) -> Mode:
    """Run the prompts of a part through an engine in this process."""
    way = WAYS[part.way]
    options = {"enable_prefix_caching": False, "max_model_len": 1024, **way}
    if ON_GPU:
        options.setdefault("num_gpu_blocks_override", 400)  # enough for 64 requests
    else:
        options["cpu_threads"] = 1 if args.jobs > 1 else None
    llm = LLM(
        args.model,
        dtype=args.dtype,
        cpu_activations=args.cpu_activations,
        load_format=args.load_format,
        batch_invariant=mode == INVARIANT,
        **options,
    )
    prompts = cut_prompts(llm.get_tokenizer().encode(TEXT.read_text("utf-8")), part)
    if part.way == HIT:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    found, begin = Mode(), CLOCK()
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found.seconds = CLOCK() - begin
    for output in outputs:
        (answer,) = output.outputs
        entries = zip(answer.token_ids, answer.logprobs or [], strict=True)
        found.digests.append(digest([(token, entry[token].logprob) for token, entry in entries]))
        found.tokens += len(answer.token_ids)
    counts = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    found.hits = int(counts["vllm:prefix_cache_hits"])
    found.preemptions = int(counts["vllm:num_preemptions"])
    return found


def ask_server(args: argparse.Namespace, part: Part) -> Mode:
    """Run the prompts of a part over HTTP: by default eight at once, whole and streamed in turns."""
    flags = ["--batch-invariant", "--max-model-len", "1024", "--load-format", args.load_format]
    if part.way == HTTP_PREEMPTED:
        flags += ["--num-gpu-blocks-override", str(BLOCKS)]
    flags += ["--dtype", args.dtype, "--cpu-activations", args.cpu_activations]
    if not ON_GPU and args.jobs > 1:
        flags += ["--cpu-threads", "1"]
    found = Mode()
    with serving(args.model, *flags) as server, httpx.Client(timeout=600, trust_env=False) as client:
        url = server.target.url
        text = {"prompt": TEXT.read_text("utf-8"), "add_special_tokens": True}
        ids = client.post(f"{url}/tokenize", json=text).raise_for_status().json()["tokens"]

        def ask(numbered: tuple[int, list[int]]) -> Answer:
            number, prompt = numbered
            body = {
                **{"prompt": prompt, "temperature": 0, "max_tokens": args.max_tokens, "logprobs": 0},
                **{"return_token_ids": True, "stream": number % 2 == (part.way == HTTP)},
            }
            if part.way in (HTTP_ALONE, HTTP_PREEMPTED):
                body["stream"] = True
            reply = client.post(f"{url}/v1/completions", json=body).raise_for_status()
            events = [reply.text]
            if body["stream"]:
                events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
            answer: Answer = []
            for choice in (choice for event in events for choice in json.loads(event)["choices"]):
                answer += zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
            return answer

        prompts = list(enumerate(cut_prompts(ids, part), part.first))
        with ThreadPoolExecutor({HTTP_ALONE: 1, HTTP_PREEMPTED: PART}.get(part.way, 8)) as pool:
            if part.way == HTTP_AGAIN:
                list(pool.map(ask, prompts))
            for answer in pool.map(ask, prompts):
                found.digests.append(digest(answer))
                found.tokens += len(answer)
        metrics = client.get(f"{url}/metrics").text
        found.hits, found.preemptions = (
            int(sum(map(float, re.findall(rf"^{name}_total{{.*}} (\S+)$", metrics, re.M))))
            for name in ("vllm:prefix_cache_hits", "vllm:num_preemptions")
        )
    return found


def cut_prompts(ids: list[int], part: Part) -> list[list[int]]:
    """Pieces of the text, of 1 to `LONGEST` tokens; prompt i is the same in every part."""
    prompts = []
    for number in range(part.first, part.first + part.count):
        chosen = random.Random(number)
        length = chosen.randint(1, LONGEST)
        start = chosen.randrange(len(ids) - length)
        prompts.append(ids[start : start + length])
    return prompts


def measure(args: argparse.Namespace, part: Part, number: int) -> Part:
    """Run one part, in a child process."""
    if part.way not in WAYS:
        part.modes[INVARIANT] = ask_server(args, part)
        return part
    modes = (INVARIANT,) if args.without_fast else (FAST, INVARIANT)
    for mode in modes[:: -1 if number % 2 else 1]:
        part.modes[mode] = run(args, part, mode)
    return part


def parts_of(prompts: range, ways: Sequence[str]) -> Iterator[Part]:
    """The parts of these ways, the longest first, so that no job is left alone at the end."""
    for way in ways:
        size = ALONE_PART if way == ALONE else PART
        for first in prompts[::size]:
            yield Part(way, first, min(size, prompts.stop - first))


class Table:
    """Adds up parts, of one shard or of several."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def digests(self, way: str, mode: str, which: int) -> dict[int, str]:
        """By number of the prompt: of its tokens (`which` = 0) or of its bits (1)."""
        return {
            part.first + i: pair[which]
            for part in self.parts
            if part.way == way and mode in part.modes
            for i, pair in enumerate(part.modes[mode].digests)
        }

    def same(self, way: str, mode: str) -> tuple[int, int]:
        """How many answers are those of the prompts alone, of how many compared."""
        which = int(mode == INVARIANT)
        alone, found = (self.digests(each, mode, which) for each in (ALONE, way))
        both = alone.keys() & found.keys()
        return sum(alone[number] == found[number] for number in both), len(both)

    def speed(self, way: str, mode: str) -> float:
        modes = [part.modes[mode] for part in self.parts if part.way == way and mode in part.modes]
        seconds = sum(each.seconds for each in modes)
        return sum(each.tokens for each in modes) / seconds if seconds else 0.0

    def print(self, prompts: int, ways: Sequence[str]) -> bool:
        """Print the table; returns whether all of so many prompts were the same in each of these ways."""
        print("| way | same tokens, fast | same bits, invariant", end=" ")
        print("| tokens/s, fast | tokens/s, invariant | cost |\n|---|---|---|---|---|---|")
        good = True
        for way in ways:
            (fast, of_fast), (invariant, of) = (self.same(way, mode) for mode in (FAST, INVARIANT))
            fast_speed, speed = (self.speed(way, mode) for mode in (FAST, INVARIANT))
            cells = [
                f"{fast} of {of_fast}" if of_fast else "",
                f"{invariant} of {of}",
                f"{fast_speed:.0f}" if fast_speed else "",
                f"{speed:.0f}" if speed else "",
                f"{100 * (1 - speed / fast_speed):.1f} %" if speed and fast_speed else "",
            ]
            print(f"| {way} | {' | '.join(cells)} |")
            good &= invariant == of == prompts
        modes = [(part.way, part.modes[INVARIANT]) for part in self.parts if INVARIANT in part.modes]
        for own, served in ((HIT, HTTP_AGAIN), (PREEMPTED, HTTP_PREEMPTED)):
            for way in {own, served} & set(ways):
                count = sum(
                    mode.hits if own == HIT else mode.preemptions for name, mode in modes if name == way
                )
                print(
                    f"\n{way}: {count} {'tokens from the cache' if own == HIT else 'preemptions'}.",
                    flush=True,
                )
                good &= count > 0
        return good


def shard_of(text: str, prompts: int) -> range:
    """The prompts of shard "2/3": whole parts."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"--shard must be like 2/3, not {text}")
    parts = -(-prompts // PART)
    first, last = (parts * each // int(count) * PART for each in (int(number) - 1, int(number)))
    return range(first, min(last, prompts))


def stored_parts(paths: Sequence[Path], of: str | None = None) -> list[Part]:
    """The parts in files of `--out`; `of`: what they must be of, beside one another. Raises `ValueError`."""
    parts = [Part.read(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
    for part in parts:
        if part.of != (parts[0].of if of is None else of):
            raise ValueError(f"there are parts of other options: {part.of}")
    return parts


def prove(args: argparse.Namespace, prompts: range, ways: Sequence[str], stored: Sequence[Part]) -> Table:
    """Run every part of the prompts that is not among those that are stored."""
    table, begin = Table(), time.monotonic()
    parts = list(parts_of(prompts, ways))
    wanted = {(part.way, part.first, part.count) for part in parts}
    known = {key: part for part in stored if (key := (part.way, part.first, part.count)) in wanted}
    table.parts += known.values()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        running = [
            pool.submit(measure, args, part, number)
            for number, part in enumerate(parts)
            if (part.way, part.first, part.count) not in known
        ]
        for done in as_completed(running):
            part = done.result()
            part.of = options_of(args)
            table.parts.append(part)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(asdict(part)) + "\n")
            same, of = table.same(part.way, INVARIANT)
            print(
                f"{time.monotonic() - begin:6.0f} s  part {len(table.parts)} of {len(parts)}: {part.way}, "
                f"prompts {part.first} to {part.first + part.count - 1}; of this way {same} of {of} the same",
                file=sys.stderr,
                flush=True,
            )
    return table


def options_of(args: argparse.Namespace) -> str:
    """What parts must have in common to be added up."""
    modes = INVARIANT if args.without_fast else f"{FAST} and {INVARIANT}"
    model = f"{args.model} ({args.load_format}, {args.dtype}, {args.cpu_activations})"
    return f"{model}, {args.max_tokens} tokens, {modes}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--prompts", type=int, default=1000, help="of all shards together")
    parser.add_argument("--shard", default="1/1", help="which share of the prompts")
    parser.add_argument("--jobs", type=int, default=1, help="parts at once")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--without-fast", action="store_true", help="run with the option only")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-activations", default="float32")
    parser.add_argument("--way", action="append", choices=EVERY_WAY[1:], help="beside alone; all by default")
    parser.add_argument("--out", type=Path, help="file to append each part to, unless it is there")
    parser.add_argument("--add-up", type=Path, nargs="+", help="files of --out: print their table only")
    args = parser.parse_args(argv)
    ways = [way for way in EVERY_WAY if way == ALONE or not args.way or way in args.way]
    table = Table()
    try:
        if args.add_up:
            table.parts = stored_parts(args.add_up)
            return int(not table.print(args.prompts, ways))
        prompts = shard_of(args.shard, args.prompts)
        stored = stored_parts([args.out] if args.out is not None else [], options_of(args))
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # the text is longer than the context, and is cut
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    return int(not prove(args, prompts, ways, stored).print(len(prompts), ways))


if __name__ == "__main__":
    sys.exit(main())
