#!/usr/bin/env python3
"""Reports the KV cache's figures from the engine's own counters: fragmentation, prefix reuse, leaked blocks.

    python scripts/kv_figures.py                    # the CPU's attention backends
    python scripts/kv_figures.py --device cuda      # those of a GPU

The workload is chat: every conversation starts with the same system prompt, and every turn sends all that was
said before it. Some conversations run at a time, so that their turns interleave; the next turn comes some
steps after the answer. It runs on the real engine with a small random model, since the figures depend on
lengths only. What is reported, at each block size:

fragmentation   unused token slots in allocated blocks / slots in allocated blocks, after every step, weighted
                by the time of the step; and its highest value. Blocks that no running request holds, but the
                prefix cache keeps, are full and count as free.
reusable        tokens of a prompt whose keys and values an earlier request had computed after the same tokens
                when this one was admitted, to the token; its last token is always computed, for its logits.
reuse           tokens taken from the cache / reusable tokens. A cache of whole blocks cannot reach 100 %;
                "of whole blocks" leaves out the tokens of blocks that were reusable only in part.
leaked          blocks that are still referenced when every request has ended.

Exit status 1 if a block leaked, or a goal is missed at the default block size of a backend.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bench.options import positive_int, span

from microvllm.openai_compat.bench.workloads import Span
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.core.plan import Request, StepPlan, StepResult
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.backends import DEFAULT_BLOCK_SIZES
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner

MAX_FRAGMENTATION, MIN_REUSE = 0.04, 0.92
MESSAGE, ANSWER, PAUSE = Span(32, 256), Span(128, 512), Span(1, 60)
SMALL_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Workload:
    """Lengths are in tokens, drawn uniformly; a pause is in steps of the engine."""

    conversations: int = 10
    at_once: int = 8
    turns: int = 4
    system_prompt: int = 512
    message: Span = MESSAGE
    answer: Span = ANSWER
    pause: Span = PAUSE
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.conversations} conversations, {self.at_once} at once, of {self.turns} turns; a shared "
            f"system prompt of {self.system_prompt} tokens, messages of {self.message} and answers of "
            f"{self.answer} tokens, a pause of {self.pause} steps before each message; seed {self.seed}"
        )


@dataclass
class Figures:
    """Of one run. Ratios are 0 to 1, tokens are counted over all prompts."""

    backend: str
    block_size: int
    requests: int = 0
    prompt_tokens: int = 0
    reusable_tokens: int = 0
    reusable_block_tokens: int = 0
    hit_tokens: int = 0
    fragmentation: float = 0.0
    peak_fragmentation: float = 0.0
    preemptions: int = 0
    leaked_blocks: int = 0
    seconds: float = 0.0

    @property
    def reuse(self) -> float:
        return self.hit_tokens / self.reusable_tokens if self.reusable_tokens else 1.0

    @property
    def block_reuse(self) -> float:
        return self.hit_tokens / self.reusable_block_tokens if self.reusable_block_tokens else 1.0

    @property
    def is_default(self) -> bool:
        return self.block_size == DEFAULT_BLOCK_SIZES[self.backend]

    @property
    def meets_goals(self) -> bool:
        return self.fragmentation <= MAX_FRAGMENTATION and self.reuse >= MIN_REUSE and not self.leaked_blocks


class Witness:
    """A runner in front of the engine's own that compares every prompt with all that was computed before."""

    def __init__(self, runner: ModelGraphRunner, figures: Figures) -> None:
        self._runner = runner
        self._figures = figures
        self._computed: dict[int, tuple[Request, int]] = {}  # by request id: its first n tokens

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)  # clock and counters

    def launch(self, plan: StepPlan) -> LaunchedStep:
        for request in plan.admitted:
            if request.num_preemptions == 0:
                reusable = self._reusable(request)
                self._figures.reusable_tokens += reusable
                self._figures.reusable_block_tokens += reusable - reusable % self._figures.block_size
        return self._runner.launch(plan)

    def collect(self, step: LaunchedStep) -> StepResult:
        for item in step.plan.scheduled:
            self._computed[item.request.id] = (item.request, item.start + item.num_new)
        return self._runner.collect(step)

    def _reusable(self, request: Request) -> int:
        prompt = np.array(request.token_ids)
        longest = 0
        for other, computed in self._computed.values():
            length = min(len(prompt) - 1, computed)
            differ = np.flatnonzero(prompt[:length] != np.array(other.token_ids[:length]))
            longest = max(longest, int(differ[0]) if len(differ) else length)
        return longest


@dataclass
class Conversation:
    messages: Iterator[tuple[list[int], int, int]]  # of each turn: tokens, length of the answer, pause
    said: list[int]  # all tokens so far
    turns_left: int
    due: int = 0  # the step of the next message
    answering: bool = False
    pause: int = 0  # steps between the end of the answer and the next message


def conversations(workload: Workload, vocab: int) -> list[Conversation]:
    """Token ids are random: two conversations are equal in the system prompt and by chance only."""
    draw = random.Random(workload.seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(count)]

    system = tokens(workload.system_prompt)
    made = []
    for _ in range(workload.conversations):
        messages = [
            (tokens(workload.message.draw(draw)), workload.answer.draw(draw), workload.pause.draw(draw))
            for _ in range(workload.turns)
        ]
        made.append(Conversation(iter(messages), list(system), workload.turns))
    return made


def run(workload: Workload, config_args: EngineArgs) -> Figures:
    """One engine, the whole workload, and the audit of its pool at the end."""
    config = config_args.resolve()
    figures = Figures(config.attention_backend, config.block_size)
    runner = ModelGraphRunner(config)
    core: EngineCore[LaunchedStep] = EngineCore(runner.config, Witness(runner, figures))  # type: ignore[arg-type]
    waiting = conversations(workload, config.spec.vocab_size)
    active: list[Conversation] = []
    by_request: dict[int, Conversation] = {}
    step, next_id, weighted, started = 0, 0, 0.0, time.perf_counter()
    while active or waiting:
        while waiting and len(active) < workload.at_once:
            active.append(waiting.pop(0))
        for each in active:
            if not each.answering and step >= each.due:
                message, answer, each.pause = next(each.messages)
                each.said += message
                each.answering = True
                by_request[next_id] = each
                params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
                refused = core.add(EngineRequest(next_id, list(each.said), params))
                if refused is not None:
                    raise SystemExit(f"a request was refused: {refused.error}")
                figures.requests, figures.prompt_tokens = next_id + 1, figures.prompt_tokens + len(each.said)
                next_id += 1
        step += 1
        if not core.has_work():
            continue  # everybody thinks
        before = time.perf_counter()
        outputs = core.step()
        seconds = time.perf_counter() - before
        for output in outputs:
            talk = by_request[output.request_id]
            talk.said += output.token_ids
            if output.finish_reason is not None:
                talk.answering, talk.due, talk.turns_left = False, step + talk.pause, talk.turns_left - 1
                if talk.turns_left == 0:
                    active.remove(talk)
        stats = core.stats()
        if stats.kv_blocks_used:
            share = stats.kv_unused_slots / (stats.kv_blocks_used * config.block_size)
            figures.fragmentation += share * seconds
            figures.peak_fragmentation = max(figures.peak_fragmentation, share)
            weighted += seconds
    while core.has_work():
        core.step()
    core.kv.check()
    stats = core.stats()
    figures.hit_tokens, figures.preemptions = stats.prefix_hits, stats.preemptions
    figures.leaked_blocks = stats.kv_blocks_used
    figures.fragmentation /= weighted or 1.0
    figures.seconds = time.perf_counter() - started
    return figures


def default_cases(device: str) -> list[tuple[str, int]]:
    if device == "cpu":
        return [("cpu", 16), ("cpu", 32), ("cpu", 64), ("cpu", 256), ("torch", 16), ("torch", 256)]
    cases = [("triton", size) for size in (16, 64, 128, 256)]
    return cases + ([("flash_attn", 256)] if importlib.util.find_spec("flash_attn") else [])


def table(rows: Sequence[Figures]) -> str:
    head = [
        "| attention backend | block size | fragmentation, mean | peak | reusable tokens | reuse "
        "| of whole blocks | leaked blocks | goals |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines = (
        f"| {row.backend} | {row.block_size}{' (default)' if row.is_default else ''} "
        f"| {row.fragmentation:.1%} | {row.peak_fragmentation:.1%} "
        f"| {row.reusable_tokens:,} of {row.prompt_tokens:,} | {row.reuse:.1%} | {row.block_reuse:.1%} "
        f"| {row.leaked_blocks} | {'met' if row.meets_goals else 'missed'} |"
        for row in rows
    )
    return "\n".join([*head, *lines])


def case(text: str) -> tuple[str, int]:
    backend, _, size = text.partition(":")
    if backend not in DEFAULT_BLOCK_SIZES or not (size.isdigit() or not size):
        raise argparse.ArgumentTypeError(f"{text}: BACKEND:BLOCK_SIZE, such as cpu:16")
    return backend, int(size or DEFAULT_BLOCK_SIZES[backend])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model folder; a small random model if not given")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", type=case, nargs="+", metavar="BACKEND:BLOCK_SIZE", help="instead of all")
    parser.add_argument("--conversations", type=positive_int, default=Workload.conversations)
    parser.add_argument("--at-once", type=positive_int, default=Workload.at_once)
    parser.add_argument("--turns", type=positive_int, default=Workload.turns)
    parser.add_argument(
        "--system-prompt", type=positive_int, default=Workload.system_prompt, metavar="TOKENS"
    )
    parser.add_argument("--message", type=span, default=Workload.message, metavar="LEAST-MOST")
    parser.add_argument("--answer", type=span, default=Workload.answer, metavar="LEAST-MOST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pool-tokens",
        type=positive_int,
        default=65536,
        help="size of the KV pool; smaller ones evict prefixes",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    args = parser.parse_args(arguments)
    workload = Workload(
        args.conversations,
        args.at_once,
        args.turns,
        args.system_prompt,
        args.message,
        args.answer,
        seed=args.seed,
    )
    print(f"Workload: {workload}.", file=sys.stderr)
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            Path(folder, "config.json").write_text(json.dumps(SMALL_MODEL), "utf-8")
        for backend, size in args.cases or default_cases(args.device):
            options = EngineArgs(
                model=args.model or folder,
                load_format=args.load_format if args.model else "dummy",
                device=args.device,
                attention_backend=backend,
                block_size=size,
                num_gpu_blocks_override=-(-args.pool_tokens // size),
                max_model_len=min(args.pool_tokens, 8192) if args.model is None else None,
                max_num_seqs=args.at_once,
                generation_config="vllm",
                cpu_threads=1 if args.model is None else None,  # nothing is large enough to share
            )
            try:
                rows.append(run(workload, options))
            except ConfigError as error:
                print(f"{backend}, block size {size}: {error}", file=sys.stderr)
                return 2
            print(f"{backend}, block size {size}: {rows[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    print(f"{workload}:\n\n{table(rows)}")
    if args.json is not None:
        document = {
            "workload": asdict(workload),
            "goals": {"fragmentation": MAX_FRAGMENTATION, "reuse": MIN_REUSE, "leaked_blocks": 0},
            "machine": platform.machine(),
            "device": args.device,
            "rows": [
                {
                    **asdict(row),
                    "reuse": row.reuse,
                    "block_reuse": row.block_reuse,
                    "meets_goals": row.meets_goals,
                }
                for row in rows
            ],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return int(any(row.leaked_blocks or (row.is_default and not row.meets_goals) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
