#!/usr/bin/env python3
"""Changes the files of a small random model, and loads each: an answer, or one line that names the file.

    python scripts/fuzz_model.py [FILE …] [--count 1000] [--seed 0]

JSON files get other values at one of their keys, or other bytes; headers of safetensors and GGUF files, and
the chat template, other bytes. Each loads and generates two tokens in a process of its own, forked from one
that has imported everything, with limits of time and memory. Prints one table and each fault: a traceback, a
line without the file's name, a signal, more than 60 s, or more than 1 GB. Exit status: 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny_models import make_hf_folder, write_gguf  # noqa: E402

from microvllm import LLM, SamplingParams  # noqa: E402
from microvllm.runtime.errors import MicroVLLMError  # noqa: E402

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TEMPLATE, SAFETENSORS, GGUF = "chat_template.jinja", "model.safetensors", "model.gguf"
FILES = (*JSON_FILES, TEMPLATE, SAFETENSORS, GGUF)
# What names the file as well: a part of it that has a name, or that may be in another one.
NAMES: dict[str, tuple[str, ...]] = {
    "tokenizer.json": ("tokenizer", "vocab"),
    "tokenizer_config.json": ("tokenizer", "chat template"),
    TEMPLATE: ("chat template",),
    SAFETENSORS: (": tensor ", "no finite logits"),
    GGUF: ("no finite logits",),
}
LIMIT_S, LIMIT_KB = 60.0, 1 << 20
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, (1 << 32) - 1, 1 << 63, 1 << 64, 10**30, -(1 << 40)),
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "a", "0", "\0", "\ud800", "a" * 10_000),
    *([], [None], [[]], [1, 2, 3], ["a"], {}, {"a": 1}, {"": {}}, [0] * 10_000),
)
BYTES = (b"\0", b"\xff", b"{", b"}", b"[", b'"', b"\\", b",", b"9", b"-", b"\xed\xa0\x80", b"\xff" * 4)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a document, of long lists and objects of a few."""
    if path:
        yield path
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in [*keys[:40], *keys[-2:]][: len(keys)]:
            yield from places(value[key], (*path, key))


def change_value(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Return a JSON document with one value replaced or left out, and what was done."""
    document = json.loads(data)
    path = chance.choice(list(places(document)) or [()])
    if not path:
        path = ("a",)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if chance.random() < 0.15 and isinstance(parent, dict):
        parent.pop(path[-1], None)
        return json.dumps(document).encode(), f"without {path}"
    value = chance.choice(VALUES)
    parent[path[-1]] = value
    return json.dumps(document).encode(), f"{path} = {str(value)[:30]!r}"


def change_bytes(data: bytes, chance: random.Random, first: int) -> tuple[bytes, str]:
    """Return data with some of the first bytes replaced, left out, repeated or cut off."""
    at = chance.randrange(min(first, len(data)))
    how = chance.choice(("replace", "replace", "insert", "flip", "flip", "cut", "drop", "repeat", "number"))
    other = chance.choice(BYTES)
    size = chance.choice((1, 2, 8, 100))
    if how == "replace":
        data = data[:at] + other + data[at + len(other) :]
    elif how == "insert":
        data = data[:at] + other * size + data[at:]
    elif how == "flip":
        data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    elif how == "cut":
        data = data[:at]
    elif how == "drop":
        data = data[:at] + data[at + size :]
    elif how == "repeat":
        data = data[: at + size] + data[at:]
    else:
        number = chance.choice((0, 1, 1 << 20, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
        data = data[:at] + number.to_bytes(8, "little") + data[at + 8 :]
    return data, f"{how} at {at} ({other!r}, {size})"


def changed(name: str, data: bytes, chance: random.Random) -> tuple[bytes, str]:
    if name in JSON_FILES and chance.random() < 0.75:
        return change_value(data, chance)
    if name == SAFETENSORS:
        size = int.from_bytes(data[:8], "little")
        if chance.random() < 0.6:
            header, what = change_value(data[8 : 8 + size], chance)
            return len(header).to_bytes(8, "little") + header + data[8 + size :], what
        return change_bytes(data, chance, 8 + size)
    # Names and numbers of a GGUF file stand before and behind the tokenizer's.
    return change_bytes(data, chance, 1500 if name == GGUF and chance.random() < 0.5 else 14_000)


def load(folder: Path, name: str) -> str:
    """Load the model and generate with it; return a fault, "refused" or "served"."""
    model = str(folder / GGUF) if name == GGUF else str(folder)
    options: dict[str, Any] = {"num_gpu_blocks_override": 16, "max_num_seqs": 2, "cpu_threads": 1}
    try:
        llm = LLM(model, **options)
        params = SamplingParams(max_tokens=2)
        if name in (TEMPLATE, "tokenizer_config.json"):
            llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)
        else:
            llm.generate(["The fox"], params, use_tqdm=False)
    except MicroVLLMError as error:
        line = str(error)
        if "\n" in line.strip():
            return f"several lines: {line[:300]!r}"
        known = (name, *NAMES.get(name, ()))
        return "refused" if any(word in line for word in known) else f"unnamed: {line[:200]}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-6:-1])
        return f"traceback: {type(error).__name__}: {str(error)[:150]} at {where}"
    return "served"


def attempt(folder: Path, name: str) -> tuple[str, int]:
    """Load in a child; return what came of it, and the most memory that it took, in KB."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.setsid()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 5 * LIMIT_KB * 1024, hard))
        os.write(writing, load(folder, name).encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        came = bool(select.select([pipe], [], [], LIMIT_S)[0])
        result = pipe.read().decode("utf-8", "replace") if came else f"hang: over {LIMIT_S:g} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    if not result:
        result = f"killed: {status}"
    return result, usage.ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)}; all by default")
    parser.add_argument("--count", type=int, default=1000, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="for each file, at most")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = make_hf_folder(Path(scratch) / "whole", "qwen2")
        settings = json.loads((whole / "tokenizer_config.json").read_text("utf-8"))
        (whole / TEMPLATE).write_text(settings.pop("chat_template"), "utf-8")
        (whole / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [319, 317], "temperature": 0.7, "top_p": 0.9, "top_k": 20}), "utf-8"
        )
        write_gguf(whole / GGUF, whole)
        shutil.copytree(whole, Path(scratch) / "changed")
        folder = Path(scratch) / "changed"
        print("| file | changes | served | refused in one line that names it | faults | most memory, MB |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in args.files or FILES:
            result, base = attempt(folder, name)
            if result != "served":
                print(f"{name}: the unchanged model: {result}")
                return 1
            counts: Counter[str] = Counter()
            lines: dict[str, str] = {}
            most, began = 0, time.monotonic()
            for number in range(args.count):
                if time.monotonic() - began > args.seconds:
                    break
                chance = random.Random(f"{args.seed} {name} {number}")
                data, what = changed(name, (whole / name).read_bytes(), chance)
                (folder / name).write_bytes(data)
                result, memory = attempt(folder, name)
                most = max(most, memory)
                if memory - base > LIMIT_KB:
                    result = f"memory: {memory >> 10} MB; {result}"
                counts[result if result in ("served", "refused") else "fault"] += 1
                if result not in ("served", "refused"):
                    lines.setdefault(result, f"  {name} {number}: {what}: {result}")
            shutil.copyfile(whole / name, folder / name)
            faults += counts["fault"]
            print(
                f"| {name} | {counts.total()} | {counts['served']} | {counts['refused']} "
                f"| {counts['fault']} | {(most - base) >> 10} |",
                *lines.values(),
                sep="\n",
                flush=True,
            )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
