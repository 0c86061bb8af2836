"""SECURITY.md names tests: each is there under that name."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_every_test_that_a_promise_names_exists() -> None:
    text = (TESTS.parent / "SECURITY.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^\s*(?:async )?def (test_\w+)\(", file.read_text("utf-8"), re.MULTILINE)
    }
    assert len(named) > 30 and not named - defined
