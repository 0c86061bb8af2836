"""The programs in docs/examples: short, and each runs as it is written, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fake_client import FakeClient
from http_tools import real_server
from model_tools import ROOT, variant_folder
from process_tools import PATIENCE_S

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "docs" / "examples" / f"{name}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_short() -> None:
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.mark.parametrize(("name", "beginning"), [("offline", "The capital of France is"), ("streaming", "")])
def test_in_this_process(name: str, beginning: str) -> None:
    output = run(name, str(variant_folder("llama-tied")))
    assert output.startswith(beginning) and len(output) > len(beginning) + 5


def test_a_server_of_its_own() -> None:
    assert run("server", str(variant_folder("llama-tied"))).strip()


def test_clients_of_a_running_server() -> None:
    with real_server(FakeClient()) as port:
        url = f"http://127.0.0.1:{port}"
        assert run("chat", url).splitlines()[0] == "> What is the capital of France?"
        output = run("compare", url, url)
    assert output.count(f"{url}: 64 tokens, ") == 2 and output.endswith("the texts are equal\n")
