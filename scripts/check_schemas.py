#!/usr/bin/env python3
"""Draw outputs by the schemas of the official test suite of JSON Schema, and validate them.

    python scripts/check_schemas.py [--schemas 500] [--outputs 3] [--suite FOLDER] [--vocabulary MODEL]

The suite (JSON-Schema-Test-Suite, MIT) is in the source distribution of the PyPI package `jsonschema`, which
pip downloads unless --suite names an unpacked one. Each schema that is not refused is sampled at temperature
1 from random logits, with the usual whitespace and with none, and every output that ended must parse and
validate. Prints why schemas are refused, and exits with 1 if an output is wrong or fewer than --schemas were
enforced.
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
