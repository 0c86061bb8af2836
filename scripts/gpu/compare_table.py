"""The table of scripts/gpu/compare.py, and the floor under its figures."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What a kernel that only reads reaches, bytes a second, by a part of the GPU's name.
READ_BYTES_S = {"H100": 3.1e12, "H200": 4.594e12}
LABELS = {
    "7b-1": "Qwen2-7B, 1 stream, 128 in / 500 out",
    "7b-35": "Qwen2-7B, 35 streams, 320 / 500",
    "0.6b-1": "Qwen3-0.6B, 1 stream, 128 / 500",
    "0.6b-256": "Qwen3-0.6B, 256 requests, U(100, 1024) / U(100, 1024), served",
    "0.6b-offline": "the same, offline (`LLM.generate`)",
    "0.5b-256": "Qwen2.5-0.5B, 256 requests, U(100, 1024) / U(100, 1024), served",
}


def machine(site: str) -> dict[str, str]:
    """GPU, driver and versions, and the day."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    names = ("torch", "triton", "transformers", "vllm")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    printed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": site}, capture_output=True, text=True
    ).stdout.split()
    return {"gpu": gpu, "date": time.strftime("%Y-%m-%d"), **dict(zip(names, printed, strict=False))}


def weight_bytes(config: dict[str, Any]) -> int:
    """What a decode step reads of the weights: all but an embedding table that is not the head, too."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    layer = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * width
    return 2 * int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def kv_bytes(config: dict[str, Any]) -> int:
    """Of one token."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * dim)


def read_rate(gpu: str) -> float | None:
    """Bytes a second that the GPU of this name reads, if that was measured."""
    return next((rate for part, rate in READ_BYTES_S.items() if part in gpu), None)


def floor_bytes(config: dict[str, Any], inputs: list[int], outputs: list[int], concurrency: int) -> float:
    """The least that a run reads: each step the weights once and its sequences' keys and values once.

    Prompts are free.
    """
    # The first token of a request comes with its prompt.
    steps = max(max(outputs) - 1, sum(n - 1 for n in outputs) / concurrency)
    cached = sum(
        (2 * before + after) * (after - 1) / 2 for before, after in zip(inputs, outputs, strict=True)
    )
    return float(steps * weight_bytes(config) + cached * kv_bytes(config))


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """ "median (least to most)"."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def markdown(files: Sequence[dict[str, Any]]) -> str:
    """One table of all rows of all files, and what belongs to it."""
    rows = {name: row for file in files for name, row in file["rows"].items()}
    gpus = {name: (file.get("machine") or {}).get("gpu", "") for file in files for name in file["rows"]}
    lines = [
        "| workload | microvllm tok/s | vLLM tok/s | ratio | TPOT, ms (vLLM) | median TTFT, ms (vLLM) "
        "| share of the floor (vLLM) |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, label in LABELS.items():
        if name not in rows:
            continue
        row = rows[name]
        runs: dict[str, list[dict[str, Any]]] = {
            engine: [run for run in row["runs"] if run["engine"] == engine]
            for engine in ("microvllm", "vllm")
        }

        def both(key: str, digits: int, runs: dict[str, list[dict[str, Any]]] = runs) -> str:
            if key not in runs["vllm"][0]:
                return "-"
            ours, theirs = (statistics.median(run[key] for run in runs[e]) for e in ("microvllm", "vllm"))
            return f"{ours:.{digits}f} ({theirs:.{digits}f})"

        speed = {engine: [run["tok_s"] for run in made] for engine, made in runs.items()}
        ratio = statistics.median(speed["microvllm"]) / statistics.median(speed["vllm"])
        rates = [
            statistics.median(
                floor_bytes(row["config"], run["inputs"], run["outputs"], row["row"]["concurrency"])
                / run["seconds"]
                for run in runs[engine]
            )
            for engine in ("microvllm", "vllm")
        ]
        digits = 1 if ratio and statistics.median(speed["vllm"]) < 1000 else 0
        cells = [spread(speed[engine], lambda v, d=digits: f"{v:,.{d}f}") for engine in ("microvllm", "vllm")]
        limit = read_rate(gpus[name])
        share = "-" if limit is None else f"{rates[0] / limit:.0%} ({rates[1] / limit:.0%})"
        lines.append(
            f"| {label} | {cells[0]} | {cells[1]} | **{ratio:.2f}** | {both('tpot_ms', 2)} "
            f"| {both('ttft_ms', 1)} | {share} |"
        )
        notes.append(note(name, row, runs))
    machines: list[dict[str, str]] = []
    for file in files:
        if file.get("machine") and file["machine"] not in machines:
            machines.append(file["machine"])
    lines += ["", *(", ".join(f"{key} {value}" for key, value in each.items()) for each in machines)]
    commands = {shown(command) for row in rows.values() for command in row["commands"].values()}
    return "\n".join([*lines, "", *notes, "", *sorted(commands)])


def note(name: str, row: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    """One line: rounds, tokens, clients and their load, preemptions, start-up."""
    made = [run for each in runs.values() for run in each]
    tokens = sorted({run["tokens"] for run in made})
    parts = [f"{len(runs['vllm'])} rounds, {', '.join(f'{n:,}' for n in tokens)} tokens each"]
    if "client_cpu" in made[0]:
        ours, theirs = (max(max(run["client_cpu"]) for run in runs[e]) for e in ("microvllm", "vllm"))
        parts.append(
            f"client processes: {row['row']['clients']}, the busiest at {ours:.0%} of a core, "
            f"with vLLM {theirs:.0%}"
        )
        low, high = min(r["prompt_lengths"][0] for r in made), max(r["prompt_lengths"][1] for r in made)
        parts.append(f"prompts of {low} to {high} tokens")
        preempted = sum(run["counters"].get("vllm:num_preemptions_total", 0) for run in made)
        parts.append(f"{preempted:.0f} preemptions")
    parts += [
        f"{engine} ready {seconds} s after its start" for engine, seconds in row["ready_s"].items() if seconds
    ]
    parts.append(f"engines in the GPU's memory: {', '.join(row['on_the_gpu'])}")
    return f"* {LABELS[name]}: {'; '.join(parts)}."


def shown(command: Sequence[str]) -> str:
    """A command line without what is this machine's own: interpreter, folders, port."""
    parts = ["python3", *command[1:]]
    for i, part in enumerate(parts):
        if part.isdigit() and (parts[i - 1] == "--port" or (parts[1].endswith(".py") and i == 4)):
            parts[i] = "PORT"
        elif part.startswith("/"):
            parts[i] = Path(part).name
    return f"    {' '.join(parts)}"
