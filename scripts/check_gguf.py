#!/usr/bin/env python3
r"""Compare this engine with llama.cpp on GGUF files that llama.cpp's own converter wrote.

    python scripts/check_gguf.py LLAMA_CPP --server LLAMA_CPP/build/bin/llama-server --tokenizer FOLDER \
        --python ENVIRONMENT/bin/python

LLAMA_CPP is its source, whose convert_hf_to_gguf.py writes small random models of `tests/tiny_models.py` as
GGUF files in float32. Both engines continue the same prompts greedily in float32: a line a family with the
number of equal leading tokens of each answer, and the largest difference of a first token's log probability.
FOLDER has a tokenizer that the converter knows, such as SmolLM2's. Exit status 1 if an answer differs where
the two best tokens are not nearly equal.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# What llama.cpp reads: GGUF has no key for many a size and bias that Hugging Face's configurations allow.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tie": True},
    "llama3": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 16384,
    },
    "qwen3": {"family": "qwen3", "tie": True, "head_dim": 48},
    "qwen3-moe": {
        "family": "qwen3_moe",
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "mixtral": {"family": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16},
    "smollm3": {"family": "smollm3", "tie": True, "num_hidden_layers": 5, "head_dim": 16},
    "granite": {
        "family": "granite",
        "head_dim": 16,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.37,
        "logits_scaling": 0.6,
    },
    "seed-oss": {"family": "seed_oss", "head_dim": 24},
    "gpt-oss": {
        "family": "gpt_oss",
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 19,
        # Of yarn's ramp llama.cpp rounds the ends, which gpt-oss's authors do not.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt-oss-mxfp4": {
        "family": "gpt_oss",
        "hidden_size": 288,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 19,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "mxfp4": True,
    },
    "lfm2": {
        "family": "lfm2",
        "tie": True,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "head_dim": 16,
    },
    "gemma3": {"family": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 19, "head_dim": 32},
}
VOCABULARY = 49152
PROMPTS = (3, 9, 40, 75)  # tokens
TOKENS = 24
# Between log probabilities: llama.cpp's GELU is a table of float16, and beside MXFP4 it rounds activations to
# 8 bits.
NEARLY, NEARLY_IN_MXFP4 = 5e-3, 0.1


def convert(name: str, folder: Path, source: Path, python: str, tokenizer: Path) -> Path:
    """Write a random model, and a GGUF file of it by llama.cpp's converter."""
    from mxfp4_folder import to_mxfp4
    from tiny_models import make_hf_folder

    options = dict(MODELS[name])
    in_mxfp4 = options.pop("mxfp4", False)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = make_hf_folder(folder / name, options.pop("family"), **options, **ids)
    if in_mxfp4:
        to_mxfp4(model)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / each, model / each)
    target = folder / f"{name}.gguf"
    command = [python, str(source / "convert_hf_to_gguf.py"), str(model)]
    ended = subprocess.run(
        [*command, "--outfile", str(target), "--outtype", "f32"], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"the converter failed: {ended.stderr.strip().splitlines()[-1]}")
    return target


def by_llama_cpp(server: Path, model: Path, prompts: list[list[int]]) -> list[tuple[list[int], float]]:
    """What llama.cpp's server answers: the tokens, and the log probability of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(server), "-m", str(model), "--port", str(port), "-t", "2", "-c", "512", "-np", "1"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.25)
            if process.poll() is not None:
                raise RuntimeError("llama.cpp's server does not start with the file")
        answers = []
        for prompt in prompts:
            body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "ignore_eos": True}
            data = json.dumps({**body, "cache_prompt": False, "return_tokens": True}).encode()
            request = urllib.request.Request(f"{url}/completion", data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as reply:
                answer = json.load(reply)
            answers.append((answer["tokens"], answer["completion_probabilities"][0]["logprob"]))
        return answers
    finally:
        process.terminate()
        process.wait()


def compare(
    model: Path, prompts: list[list[int]], theirs: list[tuple[list[int], float]], nearly: float
) -> tuple[str, bool]:
    """What to print of this engine's answers to the same prompts, and whether they agree."""
    from microvllm.runtime.offline.llm import LLM
    from microvllm.runtime.offline.sampling_params import SamplingParams

    llm = LLM(str(model), dtype="float32", device="cpu", max_model_len=512, num_gpu_blocks_override=256)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    equal, off, agree = [], 0.0, True
    for output, (reference, first) in zip(outputs, theirs, strict=True):
        ours = output.outputs[0]
        steps = ours.logprobs or []
        pairs = zip(ours.token_ids, reference, strict=True)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), TOKENS)
        equal.append(same)
        if same:
            off = max(off, abs(steps[0][ours.token_ids[0]].logprob - first))
        if same < TOKENS:
            best, second, *_ = sorted((each.logprob for each in steps[same].values()), reverse=True)
            agree = agree and best - second < nearly
    return f"{equal} of {TOKENS} tokens, log probability off by {off:.1e}", agree and off < nearly


def main() -> int:
    """Print a line a family; exit status 1 if one differs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path, metavar="LLAMA_CPP")
    parser.add_argument("--server", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="has what the converter imports")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    draw = random.Random(0)
    prompts = [[draw.randrange(100, VOCABULARY) for _ in range(length)] for length in PROMPTS]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            try:
                model = convert(name, Path(folder), args.source, args.python, args.tokenizer)
                theirs = by_llama_cpp(args.server, model, prompts)
                nearly = NEARLY_IN_MXFP4 if MODELS[name].get("mxfp4") else NEARLY
                line, agree = compare(model, prompts, theirs, nearly)
            except RuntimeError as error:
                line, agree = str(error), False
            print(f"{name:14} {'' if agree else 'DIFFERS: '}{line}", flush=True)
            status |= not agree
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
