"""scripts/compare_flags.py against a made-up vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from microvllm.runtime.options import vllm_environment

SCRIPT = Path(__file__).parent.parents[1] / "scripts" / "compare_flags.py"
VARIABLES = list(vllm_environment.VARIABLES)


def option(*spellings: str, nargs: Any = None, action: str = "_StoreAction", default: str = "None") -> Any:
    return {"spellings": spellings, "nargs": nargs, "action": action, "default": default}


def compare(folder: Path, options: list[Any], variables: list[str], *argv: str) -> tuple[int, str]:
    """Exit status and output, with an interpreter that prints what vLLM's would."""
    python = folder / "python"
    found = json.dumps({"options": options, "variables": variables})
    python.write_text(f"#!/bin/sh\ncat <<'EOF'\nINFO a line of its log\n{found}\nEOF\n")
    python.chmod(0o755)
    command = [sys.executable, str(SCRIPT), "--vllm-python", str(python), *argv]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def test_what_differs_is_printed(tmp_path: Path) -> None:
    same = [
        option("--swap-space"),
        option("--max-num-seqs"),
        option("--enable-lora", "--no-enable-lora", "--disable-lora", nargs=0, action="EnableDisableAction"),
    ]
    status, output = compare(tmp_path, same, VARIABLES)
    assert status == 0 and "unknown here" not in output and "default:" not in output
    assert "3 options of vLLM: 1 honoured, 1 ignored with a line, 1 refused" in output
    other = [
        option("--brand-new"),
        option("--port", "-new", default="9000"),
        option("--enforce-eager"),  # takes a word
    ]
    status, output = compare(tmp_path, same + other, [*VARIABLES[1:], "VLLM_BRAND_NEW"])
    assert status == 1
    assert "unknown here: unknown flag --brand-new" in output
    assert "unknown here: unknown flag -new" in output
    assert "unknown here: --enforce-eager leaves 1 over" in output
    assert "default: --port is 8000 here, 9000 in vLLM" in output
    assert "environment: VLLM_BRAND_NEW is not known here" in output
    assert f"environment: {VARIABLES[0]} is none of vLLM" in output


def test_the_lists_of_the_tests(tmp_path: Path) -> None:
    options = [option("--b"), option("--a", "-a"), option("--c", nargs="+"), option("--d", nargs=0)]
    status, output = compare(tmp_path, options, [], "--list")
    assert (status, output.splitlines()) == (0, ["value: a b", "list: c", "pair: d"])


def test_an_interpreter_without_vllm(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--vllm-python", sys.executable],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1 and "No module named 'vllm'" in result.stderr
