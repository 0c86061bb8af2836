#!/usr/bin/env python3
"""Count lines of code per folder, Python and C: without blank lines, comments and docstrings.

    python scripts/count_lines.py [--core] [ROOT]

Prints a Markdown table. The engine's core is runtime + adapters + ops: what happens between token ids and
token ids. The core path is the part of it that a reader should read first: --core lists its files instead.
A string that is a statement of its own counts as a docstring wherever it stands.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("runtime", "adapters", "ops")
FOLDERS = (*CORE, "openai_compat", ".", "scripts", "tests")
"""`.` holds the files at the top: the command line and the package's `__init__.py`."""
CORE_PATH = (
    *("runtime/request.py", "runtime/core/*.py", "runtime/worker/*.py", "adapters/spec.py"),
    *("adapters/decoder.py", "ops/operators.py", "ops/attention/__init__.py"),
)
OFF_THE_PATH = {
    *("bitmask.py", "checkpoints.py", "counters.py", "deadlines.py", "drafts.py", "gpu_memory.py"),
    *("gpu_rules.py", "graph_levers.py", "loading.py", "logprobs.py", "no_token.py", "penalties.py"),
    *("pool_audit.py", "pooling.py", "prefix_keys.py", "profiler.py", "repetition.py", "sleep.py"),
    *("states.py", "step_sizes.py", "step_times.py", "thinking.py", "transfers.py", "warm_up.py"),
}
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
# Whatever of these begins first ends only with itself: `//` in a string is no comment.
C_PIECES = re.compile(
    r"""(?P<comment>//(?:\\\n|[^\n])*|/\*.*?(?:\*/|\Z))|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL
)


def python_lines(source: str) -> int:
    """Lines of Python that hold more than a comment or a docstring. Raises `SyntaxError`."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = source.splitlines()
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SILENT or (token.type == tokenize.STRING and token.start[0] in docstrings):
            continue
        code.update(number for number in range(token.start[0], token.end[0] + 1) if lines[number - 1].strip())
    return len(code)


def c_lines(source: str) -> int:
    """Lines of C that hold more than a comment."""

    def without_comments(match: re.Match[str]) -> str:
        text = match.group()
        return " " + "\n" * text.count("\n") if match.group("comment") else text

    return sum(bool(line.strip()) for line in C_PIECES.sub(without_comments, source).split("\n"))


COUNTERS: dict[str, Callable[[str], int]] = {".py": python_lines, ".c": c_lines, ".h": c_lines}


@dataclass(frozen=True)
class Folder:
    """What is in a folder and those below it."""

    name: str
    files: int
    python: int
    c: int

    @property
    def lines(self) -> int:
        return self.python + self.c


def source_files(folder: Path, *, deep: bool) -> Iterator[Path]:
    """Sources in a folder, and below it if `deep`; nothing hidden or generated."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        if path.is_dir() and deep:
            yield from source_files(path, deep=True)
        elif path.suffix in COUNTERS and path.is_file():
            yield path


def count(root: Path, name: str) -> Folder:
    """The counts of one of `FOLDERS`."""
    files = list(source_files(root / name, deep=name != "."))
    lines = dict.fromkeys(COUNTERS, 0)
    for file in files:
        lines[file.suffix] += COUNTERS[file.suffix](file.read_text("utf-8"))
    label = "cli.py, `__init__.py`" if name == "." else f"{name}/"
    return Folder(label, len(files), lines[".py"], lines[".c"] + lines[".h"])


def core_path(root: Path) -> dict[str, int]:
    """The lines of each file of the core path that holds code."""
    files = [file for pattern in CORE_PATH for file in sorted(root.glob(pattern))]
    lines = {str(file.relative_to(root)): python_lines(file.read_text("utf-8")) for file in files}
    return {name: n for name, n in lines.items() if n and Path(name).name not in OFF_THE_PATH}


def total(name: str, folders: list[Folder]) -> Folder:
    return Folder(
        name,
        sum(folder.files for folder in folders),
        sum(folder.python for folder in folders),
        sum(folder.c for folder in folders),
    )


def markdown(root: Path) -> str:
    """The table, with the engine's core and the whole package summed up."""
    folders = {name: count(root, name) for name in FOLDERS if (root / name).is_dir()}
    core = [folder for name, folder in folders.items() if name in CORE]
    package = [folder for name, folder in folders.items() if name not in ("scripts", "tests")]
    path = core_path(root)
    rows = [
        *core,
        total("**engine core**", core),
        Folder("core path", len(path), sum(path.values()), 0),
    ]
    rows += [folder for folder in package if folder not in core]
    rows += [total("**package**", package)]
    rows += [folder for folder in folders.values() if folder not in package]
    lines = ["| | files | Python | C | lines of code |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        c = f"{row.c:,}" if row.c else ""
        lines.append(f"| {row.name} | {row.files} | {row.python:,} | {c} | {row.lines:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--core", action="store_true", help="the files of the core path and their sum")
    args = parser.parse_args()
    if not (args.root / "runtime").is_dir():
        print(f"count_lines: {args.root}: has no folder runtime", file=sys.stderr)
        return 2
    if args.core:
        path = core_path(args.root)
        for name, lines in path.items():
            print(f"{lines:6,}  {name}")
        print(f"{sum(path.values()):6,}  in {len(path)} files")
        return 0
    print(markdown(args.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
