#!/usr/bin/env python3
"""Change each key of small models' configurations, and compare the logits with transformers'.

    python scripts/check_configs.py [--models gpt-oss gemma4 ...] [--list] [--bad]

The models are those of `tests/model_tools.py`, the keys all that transformers' configuration class of a
family has, those of nested objects too, and `OLDER`, which it reads under other names. Each is set to other
plausible values, to null, and left out, one at a time; with `--bad` to values of wrong types and sizes. What
a changed config.json gives is one of

    refused   this engine names the problem in one line
    equal     both give the same logits, to 1e-3 of the largest
    alone     transformers refuses it or cannot load the weights, and so there is nothing to compare with
    DIFFERENT the logits differ
    FAILED    this engine raised something else than its error for files

Prints the last two, and a count of each. Ends with 1 unless there are none besides `KNOWN`. A model takes
5 to 20 seconds.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from microvllm.adapters.errors import ModelFileError
from microvllm.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from model_tools import (  # noqa: E402
    VARIANTS,
    drain,
    make_engine,
    make_request,
    recorded_logits,
    variant_folder,
)

PROMPT = [(index * 37 + 11) % 300 for index in range(70)]
TOLERANCE = 1e-3
REMOVED = object()
# What names files, texts and training, and what the tokenizer or the engine reads in another way.
IGNORED = {
    *("architectures", "model_type", "transformers_version", "vocab_size", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "use_cache", "initializer_range", "attention_dropout", "per_layer_config"),
}
OLDER: dict[str, list[Any]] = {
    "rope_theta": [500.0],
    "rope_scaling": [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}],
    "rope_parameters": [{}, {"rope_theta": 300.0}, {"rope_type": "linear", "factor": 3.0}],
    "partial_rotary_factor": [0.5, 0.75],
    "rotary_dim": [8],
    "rope_local_base_freq": [500.0],
    "sliding_window_pattern": [2],
    "sliding_window": [7],
    "use_sliding_window": [True, False],
    "num_experts": [3],
    "num_local_experts": [3],
    "n_routed_experts": [3],
    "num_experts_per_tok": [1],
    "norm_topk_prob": [True, False],
    "clip_qkv": [0.1],
}
# What differs on purpose: transformers takes a ratio of lengths below 1 for yarn's factor.
KNOWN = {("rope_parameters.factor", "null")}


def theirs(folder: Path) -> torch.Tensor | None:
    """The logits of transformers: [tokens, vocabulary]; None if it refuses the folder."""
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if found["missing_keys"] or found["mismatched_keys"]:
            return None
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(torch.tensor([PROMPT])).logits[0]
    except Exception:  # it raises whatever its layers do
        return None
    return logits


def ours(folder: Path) -> torch.Tensor | str:
    """The logits here, or the one line of a refusal."""
    try:
        engine = make_engine(folder, enable_prefix_caching=False)
    except (ConfigError, ModelFileError) as error:
        return str(error)
    request = make_request(0, PROMPT, 1)
    if (refused := engine.core.add(request)) is not None:
        return str(refused.error)
    with recorded_logits(engine, every_position=True) as logits:
        list(drain(engine))
    return torch.stack([logits[index] for index in range(len(PROMPT))])


def others(value: Any) -> list[Any]:
    """Plausible values in place of one."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2, max(1, value // 2), 0]
        case float():
            return [value * 1.5, value * 0.5, 1.0]
        case str():
            return ["gelu", "relu", "x"]
        case list():
            return [value[::-1], value[1:] + value[:1], value[:-1], []]
        case None:
            return [True, 1, 2, 0.5]
    return []


BAD = [-1, "7", [1], {}, 1e30, float("nan"), 10**12, True]


def keys(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each key of an object and of those in it, as a path, with its value."""
    for key, value in values.items():
        if not key.startswith("_") and not (key in IGNORED and not path):
            yield (*path, key), value
            if isinstance(value, dict):
                yield from keys(value, (*path, key))


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    if value is REMOVED:
        place.pop(path[-1], None)
    else:
        place[path[-1]] = value
    return config


def changes(folder: Path, config: dict[str, Any], *, bad: bool) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each key with each value that it is given."""
    known = {**transformers.AutoConfig.from_pretrained(folder).to_dict(), **config}
    for path, value in keys(known):
        for other in [*(BAD if bad else others(value)), None, REMOVED]:
            if not (type(other) is type(value) and other == value):
                yield path, other
    for key, values in {} if bad else OLDER.items():
        yield from (((key,), value) for value in values)


def outcome(folder: Path) -> tuple[str, str]:
    """One of the words above, and what there is to say about it."""
    try:
        here = ours(folder)
    except Exception:
        return "FAILED", traceback.format_exc().strip().splitlines()[-1]
    if isinstance(here, str):
        return ("refused", here) if "\n" not in here else ("FAILED", here)
    there = theirs(folder)
    if there is None:
        return "alone", ""
    apart = float((here - there).abs().max() / there.abs().max())
    return ("equal", "") if apart < TOLERANCE else ("DIFFERENT", f"by {apart:.2g}")


def check(name: str, folder: Path, *, bad: bool) -> collections.Counter[str]:
    """Print what is wrong with one model, and return how often each outcome came."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    unchanged, said = outcome(folder)
    if unchanged != "equal":
        raise SystemExit(f"{name}: unchanged, {unchanged} {said}")
    counts: collections.Counter[str] = collections.Counter()
    for path, value in changes(folder, config, bad=bad):
        file.write_text(json.dumps(changed(config, path, value)), "utf-8")
        kind, said = outcome(folder)
        shown = "left out" if value is REMOVED else json.dumps(value)
        if kind == "DIFFERENT" and (".".join(path), shown) in KNOWN:
            kind = "known"
        counts[kind] += 1
        if kind.isupper():
            print(f"{name}: {'.'.join(path)} {shown}: {kind} {said}", flush=True)
    print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="MODEL")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    parser.add_argument("--bad", action="store_true", help="values of wrong types and sizes")
    args = parser.parse_args()
    if args.list:
        print(*VARIANTS, sep="\n")
        return 0
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    total: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            folder = Path(shutil.copytree(variant_folder(name), Path(temporary) / name))
            total += check(name, folder, bad=args.bad)
    return int(total["DIFFERENT"] + total["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
