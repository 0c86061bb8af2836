"""The line count: known sources give known counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_tools import ROOT, load_script

script = load_script("count_lines")

PYTHON = '''#!/usr/bin/env python3
"""A docstring
of two lines."""

import os  # code, with a comment


class A:
    """Docs."""

    x: int = 1
    """What x is."""

    def f(self):
        # a comment
        text = """a string

        # no comment in here
        """
        return (
            text
        )


def g(): """docs on the same line"""; return "x"
'''

C = """/* A comment
   of two lines */
#include <math.h>   // code

static const char *url = "http://x";  /* code */
/* before */ int a; /* after
*/ int b;
char quote = '"'; // "
// int c; \\
   int d;
int e = 4 /* in the middle */ / 2;
"""


def test_python() -> None:
    assert script.python_lines(PYTHON) == 11
    assert script.python_lines('"""Only docs."""\n# and a comment\n\n') == 0
    assert script.python_lines("") == 0


def test_c() -> None:
    assert script.c_lines(C) == 6
    assert script.c_lines("// a\n/* b\n\n c */\n\n") == 0
    assert script.c_lines('char *s = "/*";\nint a;\nchar *t = "*/";\n') == 3


def test_the_table_of_a_small_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "cli.py": "a = 1\n",
        "setup.cfg": "no = code\n",
        "runtime/x.py": "a = 1\nb = 2\n",
        "runtime/__pycache__/y.py": "a = 1\n",
        "runtime/.hidden.py": "a = 1\n",
        "ops/cpu/k.c": "int a;\n",
        "ops/cpu/k.h": "int b;\n",
        "tests/test_x.py": "a = 1\n" * 1234,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert script.markdown(tmp_path).splitlines()[2:] == [
        "| runtime/ | 1 | 2 |  | 2 |",
        "| ops/ | 2 | 0 | 2 | 2 |",
        "| **engine core** | 3 | 2 | 2 | 4 |",
        "| core path | 0 | 0 |  | 0 |",
        "| cli.py, `__init__.py` | 1 | 1 |  | 1 |",
        "| **package** | 4 | 3 | 2 | 5 |",
        "| tests/ | 1 | 1,234 |  | 1,234 |",
    ]


def test_this_repository() -> None:
    """Sources of both languages are readable to it, and no counter loses a file. All of them take 12 s."""
    for name in ("ops", ".", "scripts"):
        folder = script.count(ROOT, name)
        assert (
            0
            < folder.lines
            < sum(
                len(path.read_text("utf-8").splitlines())
                for path in script.source_files(ROOT / name, deep=name != ".")
            )
        )


def test_the_core_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "runtime/request.py": "a = 1\n",
        "runtime/other.py": "a = 1\n",
        "runtime/core/__init__.py": "",
        "runtime/core/plan.py": "a = 1\nb = 2\n",
        "runtime/worker/step_times.py": "a = 1\n",
        "adapters/spec.py": "a = 1\n",
        "adapters/decoder.py": "a = 1\n",
        "ops/operators.py": "a = 1\n",
        "ops/attention/__init__.py": "a = 1\n",
        "ops/attention/torch_backend.py": "a = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sys.argv", ["count_lines", "--core", str(tmp_path)])
    assert script.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["     1  runtime/request.py", "     2  runtime/core/plan.py"]
    assert len(lines) == 7 and lines[-1] == "     7  in 6 files"
