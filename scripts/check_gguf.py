#!/usr/bin/env python3
r"""Compare this engine with llama.cpp on GGUF files that llama.cpp's own converter wrote.

    python scripts/check_gguf.py LLAMA_CPP --server LLAMA_CPP/build/bin/llama-server \
        --python ENVIRONMENT/bin/python

LLAMA_CPP is its source, whose convert_hf_to_gguf.py writes small random models, most of them those of the
tests, as GGUF files in float32. Both engines continue the same prompts greedily in float32: a line a family
with the number of equal leading tokens of each answer, and the largest difference of a first token's log
probability. Exit status 1 if an answer differs where the two best tokens are not nearly equal.
"""

from __future__ import annotations

import argparse
import json
import random
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

from model_tools import VARIANTS  # noqa: E402


def like(variant: str, *left_out: str, **changes: Any) -> dict[str, Any]:
    """The options of one of the tests' models, without these and with the changes; of the usual seed."""
    kept = {key: value for key, value in VARIANTS[variant].items() if key not in (*left_out, "seed")}
    return kept | changes


# What llama.cpp reads: GGUF has no key for many a size and bias that Hugging Face's configurations allow.
# Beside the options of `make_hf_folder`: "config" replaces values of config.json, "no_drafts" leaves out what
# predicts further tokens, which the models do not have.
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "no_drafts": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0}
# Of yarn's ramp llama.cpp rounds the ends, which gpt-oss's authors do not.
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 18,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "scoring_func": "sigmoid",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": like("llama-tied"),
    "llama3": like(
        "llama-llama3-rope",
        "head_dim",
        rope_parameters={
            **VARIANTS["llama-llama3-rope"]["rope_parameters"],
            "original_max_position_embeddings": 8192,
        },
        max_position_embeddings=16384,
    ),
    "qwen3": like("qwen3"),
    "qwen3-moe": like("qwen3-moe", moe_intermediate_size=96),
    "mixtral": like("mixtral", head_dim=16),
    "smollm3": {"family": "smollm3", "tie": True, "num_hidden_layers": 5, "head_dim": 16},
    "granite": like("granite", "rms_norm_eps", "attention_bias", head_dim=16),
    "seed-oss": like("seed-oss", "attention_out_bias", "mlp_bias"),
    "gpt-oss": like("gpt-oss", rope_parameters=PLAIN),
    "gpt-oss-mxfp4": like(
        "gpt-oss", hidden_size=288, intermediate_size=320, rope_parameters=PLAIN, mxfp4=True
    ),
    "lfm2": {
        "family": "lfm2",
        "tie": True,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "head_dim": 16,
    },
    "lfm2-moe": like("lfm2-moe", head_dim=16),
    "gemma2": like("gemma2", query_pre_attn_scalar=32),
    "gemma3": {"family": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 19, "head_dim": 32},
    "gemma4": like("gemma4"),
    "gemma4-shared": like("gemma4-shared", final_logit_softcapping=8.0),
    "gemma4-moe": like("gemma4-moe", final_logit_softcapping=8.0),
    "qwen2": like("qwen2"),
    "qwen2-moe": like("qwen2-moe", head_dim=16),
    "mistral": like("mistral"),
    "phi3": {"family": "phi3", "head_dim": 16},
    "phi4-mini": like("phi4-mini", max_position_embeddings=2048),
    "granite4": like(
        "granite4",
        config={"layer_types": ["attention"] * 3, "num_experts_per_tok": 0},
        shared_intermediate_size=160,
    ),
    "glm4": like("glm4", "rms_norm_eps"),
    "olmo3": like(
        "olmo3",
        "rms_norm_eps",
        head_dim=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {**YARN, "factor": 8.0, "original_max_position_embeddings": 64},
        },
    ),
    "ministral3": like("ministral3", rope_parameters={**VARIANTS["ministral3"]["rope_parameters"], **YARN}),
    "qwen35": like("qwen3.5", **DELTA),
    "qwen35-moe": like("qwen3.5-moe", "attention_bias", **DELTA),
    "qwen3-next": like("qwen3-next", "mlp_only_layers", **DELTA, moe_intermediate_size=32),
    "glm4-moe": like("glm4-moe", "n_group", "topk_group", n_shared_experts=1, no_drafts=True),
    "deepseek-v3": like(
        "deepseek-v3",
        scoring_func="sigmoid",
        n_shared_experts=2,
        rope_parameters={
            **YARN,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "glm4-moe-lite": like("glm4-moe-lite", "mlp_layer_types", "rms_norm_eps", **LATENT, q_lora_rank=24),
    "minimax-m2": like("minimax-m2", scoring_func="sigmoid"),
    # Of its shared expert the converter writes intermediate_size / num_key_value_heads as the width.
    "ernie-moe": like("ernie-moe", head_dim=16, intermediate_size=120, moe_layer_interval=1),
    "olmoe": like("olmoe", num_key_value_heads=9),
}
# Families' converters want the tokenizers of their makers. These models have none: their tokens are numbers.
CONVERTER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf as script

def write_vocabulary(model):
    size = model.hparams["vocab_size"]
    model.gguf_writer.add_tokenizer_model("gpt2")
    model.gguf_writer.add_tokenizer_pre("gpt-2")
    model.gguf_writer.add_token_list(["a", "b", "ab", *(f"<{index}>" for index in range(3, size))])
    model.gguf_writer.add_token_types([1] * size)
    model.gguf_writer.add_token_merges(["a b"])
    model.gguf_writer.add_eos_token_id(2)

def find(*names, **options):
    model = original(*names, **options)
    inner = [each for each in vars(model).values() if isinstance(each, type)]
    for each in (model, *inner):
        each.set_vocab = write_vocabulary
    return model

original, script.get_model_class = script.get_model_class, find
script.main()
"""
VOCABULARY = 320
PROMPTS = (3, 9, 40, 75)  # tokens
TOKENS = 24
# Between log probabilities: llama.cpp's GELU is a table of float16, and beside MXFP4 it rounds activations to
# 8 bits.
NEARLY, NEARLY_IN_MXFP4 = 5e-3, 0.1


def convert(name: str, folder: Path, source: Path, python: str) -> Path:
    """Write a random model, and a GGUF file of it by llama.cpp's converter."""
    from mxfp4_folder import to_mxfp4
    from tiny_models import make_hf_folder

    options = dict(MODELS[name])
    in_mxfp4, no_drafts = options.pop("mxfp4", False), options.pop("no_drafts", False)
    replaced = options.pop("config", None)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = make_hf_folder(folder / name, options.pop("family"), **options, **ids)
    if in_mxfp4:
        to_mxfp4(model)
    if replaced:
        stored = json.loads((model / "config.json").read_text("utf-8"))
        (model / "config.json").write_text(json.dumps({**stored, **replaced}), "utf-8")
    target = folder / f"{name}.gguf"
    command = [python, "-c", CONVERTER, str(source), str(model), "--outfile", str(target)]
    command += ["--outtype", "f32", "--model-name", "tiny"]
    if no_drafts:
        command.append("--no-mtp")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
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
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, logprobs=2)
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
    parser.add_argument("--python", default=sys.executable, help="has what the converter imports")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPTS]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            try:
                model = convert(name, Path(folder), args.source, args.python)
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
