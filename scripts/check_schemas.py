#!/usr/bin/env python3
"""Draw outputs by the schemas of the official test suite of JSON Schema, and validate them.

    python scripts/check_schemas.py [--schemas 500] [--outputs 3] [--suite FOLDER] [--vocabulary MODEL]
                                    [--calls FORMAT]

The suite (JSON-Schema-Test-Suite, MIT) is in the source distribution of the PyPI package `jsonschema`, which
pip downloads unless --suite names an unpacked one. Each schema that is not refused is sampled at temperature
1 from random logits, with the usual whitespace and with none, and every output that ended must parse and
validate. Prints why schemas are refused, and exits with 1 if an output is wrong or fewer than --schemas were
enforced.

With --calls the schemas are those of all arguments of a strict function, and those of its only argument.
Calls are drawn in this format, which its parser must read as one call with such arguments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "jsonschema==4.26.0"
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
}


def download(folder: Path) -> Path:
    """Download and unpack the suite; returns its folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, [m for m in packed.getmembers() if "/json/tests/" in m.name], filter="data")
    return next(folder.glob("*/json"))


def schemas(suite: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the schema of each group of tests, equal ones once."""
    seen = set()
    for draft, meta in DRAFTS.items():
        for file in sorted((suite / "tests" / draft).glob("*.json")):
            for group in json.loads(file.read_text()):
                schema = group["schema"]
                if isinstance(schema, dict):
                    schema = {"$schema": meta, **schema}
                key = json.dumps(schema)
                if key not in seen:
                    seen.add(key)
                    yield f"{draft}/{file.name}: {group['description']}", schema


def vocabulary(model: str | None) -> Any:
    from random_outputs import Vocabulary, small_vocabulary

    if model is None:
        return small_vocabulary()
    from microvllm.runtime.config import EngineArgs
    from microvllm.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(EngineArgs(model=model).resolve().tokenizer_path))
    if tokenizer.token_bytes is None:
        sys.exit("this tokenizer has no table of bytes")
    return Vocabulary.of(tokenizer.token_bytes.all, sorted(tokenizer.special_ids))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--outputs", type=int, default=3, help="of each schema and whitespace")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--vocabulary", metavar="MODEL", help="take this model's; else a small one of bytes")
    parser.add_argument("--calls", metavar="FORMAT", help="of docs/tools.md, such as qwen3_coder")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "grammar"))
    from random_outputs import draw, faults, grammar_of

    from microvllm.runtime.errors import InvalidRequestError
    from microvllm.runtime.request import StructuredOutput

    start, words = time.monotonic(), vocabulary(args.vocabulary)
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        suite = args.suite or download(Path(folder))
        for place, schema in schemas(suite):
            if args.calls:
                for parameters in (schema, as_argument(schema)):
                    try:
                        found = call_faults(args.calls, parameters, words, args.outputs, counts)
                    except InvalidRequestError as error:
                        counts["refused"] += 1
                        refusals[str(error).split(" (at ")[0][:90]] += 1
                    else:
                        counts["schemas"] += found is not None
                        wrong += [f"{place}: {fault}" for fault in found or ()]
                continue
            for whitespace in (None, ""):
                form = StructuredOutput(kind="json", spec=json.dumps(schema), whitespace=whitespace)
                try:
                    grammar = grammar_of(form)
                except InvalidRequestError as error:
                    counts["refused"] += whitespace is None
                    refusals[str(error).split(" (at ")[0][:90]] += whitespace is None
                    continue
                counts["schemas"] += whitespace is None
                for seed in range(args.outputs):
                    output = draw(form, grammar, words, np.random.default_rng(seed))
                    counts["outputs" if output is not None else "cut off"] += 1
                    found = [] if output is None else faults(schema, output)
                    if output is not None and whitespace == "" and json_whitespace(output):
                        found.append("whitespace")
                    wrong += [f"{place}: {output!r}: {fault}" for fault in found]
    for reason, count in refusals.most_common():
        print(f"{count:5}  {reason}")
    print("\n".join(wrong))
    print(
        f"{counts['schemas']} schemas enforced, {counts['refused']} refused; {counts['outputs']} outputs, "
        f"{counts['cut off']} more cut off at their limit, {len(wrong)} wrong; "
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if wrong or counts["schemas"] < args.schemas else 0


def as_argument(schema: Any) -> Any:
    """Return the parameters of a function whose one argument follows a schema; None if that has a name."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            name: f"#/properties/v{item[1:]}"
            if name == "$ref" and isinstance(item, str) and item[:2] in ("#", "#/")
            else moved(item)
            for name, item in value.items()
        }

    text = json.dumps(schema)
    if '"$id"' in text or '"id"' in text:
        return None
    meta = {"$schema": schema["$schema"]} if isinstance(schema, dict) else {}
    own = {name: item for name, item in schema.items() if name != "$schema"} if meta else schema
    properties = {"v": moved(own)}
    return {
        **meta,
        "type": "object",
        "properties": properties,
        "required": ["v"],
        "additionalProperties": False,
    }


def call_faults(
    name: str, parameters: Any, words: Any, outputs: int, counts: Counter[str]
) -> list[str] | None:
    """Draw calls of a strict function; return what is wrong with them, None if these are no arguments."""
    from random_outputs import draw, faults, grammar_of

    from microvllm.openai_compat.parsers.events import Function, fold
    from microvllm.openai_compat.parsers.formats import TOOL_FORMATS
    from microvllm.openai_compat.parsers.grammars import tool_grammar
    from microvllm.openai_compat.parsers.registry import make_parser

    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        return None
    form, function = TOOL_FORMATS[name], Function("f", {"type": "object", **parameters}, strict=True)
    made = tool_grammar(form, [function], "required", parallel=False)
    assert made is not None
    grammar, wrong = grammar_of(made), []
    # What ends a text between tags, which a random one would not come upon.
    own, (_, end) = getattr(form, "own_lines", False), getattr(form, "argument", ("", ""))
    for seed in range(outputs):
        output = draw(made, grammar, words, np.random.default_rng(seed), f"{chr(10) * own}{end}".encode())
        counts["outputs" if output is not None else "cut off"] += 1
        if output is None:
            continue
        parser = make_parser(name, None, tools=[function])
        calls = fold(parser.feed(output.decode()) + parser.end()).tool_calls
        if len(calls) != 1:
            wrong.append(f"{output!r}: {len(calls)} calls")
        else:
            wrong += [
                f"{output!r}: {fault}" for fault in faults(function.parameters, calls[0].arguments.encode())
            ]
    return wrong


def json_whitespace(output: bytes) -> bool:
    """Whether anything stands between the tokens of a JSON text."""
    outside, inside, escaped = 0, False, False
    for byte in output:
        if inside:
            inside, escaped = escaped or byte != ord('"'), byte == ord("\\") and not escaped
        else:
            inside = byte == ord('"')
            outside += byte in b" \t\r\n"
    return outside > 0


if __name__ == "__main__":
    sys.exit(main())
