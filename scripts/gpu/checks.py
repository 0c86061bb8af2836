"""Runs every check of the engine that needs a GPU, and prints one table.

    python scripts/gpu/checks.py [--only NAME…] [--logs FOLDER]

Checks that time nothing run side by side. Each one's output goes to FOLDER/NAME.log; of one that fails the
end is shown. Exit status: 0, or 1 if a check failed. scripts/gpu/test.sh sets up what this needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 540
SHOWN_LINES = 40  # of a failed check's output
SANITIZE = [sys.executable, "scripts/gpu/sanitize.py"]


@dataclass(frozen=True)
class Check:
    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """counts: passed, failed, skipped; of what counts nothing the check itself is the one."""

    name: str
    status: int
    counts: tuple[int, int, int]
    seconds: float
    output: str
    note: str = ""


def pytest(name: str, *paths: str) -> Check:
    # pytest-benchmark, where it is installed, warns that it does not go with xdist, and warnings are errors.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *paths]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(6, os.cpu_count() or 1))]
    return Check(name, command)


def sanitizer(tool: str) -> Check:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    # cuBLAS's kernels for Hopper hand buffers over in ways that racecheck does not follow.
    command += ["--kernel-regex-exclude", "kns=nvjet", "--target-processes", "application-only", *SANITIZE]
    return Check(tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def stages() -> list[list[Check]]:
    """Of one stage all run at the same time; what is timed runs alone."""
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_triton_*.py"))
    return [
        [
            pytest("kernels", *kernels),
            pytest("engine", "tests/gpu"),
            # Compiles what the sanitizer's runs then find in Triton's cache.
            Check("every-kernel", SANITIZE),
        ],
        [sanitizer("memcheck"), sanitizer("racecheck"), sanitizer("synccheck")],
        [Check("time-ops", [sys.executable, "scripts/gpu/check_ops.py"])],
        [Check("time-attention", [sys.executable, "scripts/gpu/check_attention.py"])],
    ]


def run(check: Check, logs: Path) -> Result:
    log, started = logs / f"{check.name}.log", time.monotonic()
    if shutil.which(check.command[0]) is None:
        return Result(check.name, 0, (0, 0, 1), 0.0, "", f"{check.command[0]} is not there")
    with log.open("w") as file:
        try:
            status = subprocess.run(
                check.command,
                cwd=ROOT,
                env={**os.environ, **check.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    output = log.read_text("utf-8", "replace")
    counts = pytest_counts(output) if "pytest" in check.command else (int(not status), int(bool(status)), 0)
    summary = re.findall(r"={4,} (ERROR SUMMARY|RACECHECK SUMMARY)(: .*)", output)
    note = "".join(summary[-1]) if summary else "timed out" if status == 124 else ""
    return Result(check.name, status, counts, time.monotonic() - started, output, note)


def pytest_counts(output: str) -> tuple[int, int, int]:
    """Of the summary line, "3 failed, 40 passed, 2 skipped in 9.1s"; errors count as failures."""
    found = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)
    }
    return (
        found.get("passed", 0),
        found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0),
        found.get("skipped", 0),
    )


def machine() -> str:
    import torch
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return (
        f"{torch.cuda.get_device_name()}, driver {driver.stdout.strip()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {time.strftime('%Y-%m-%d')}"
    )


def table(results: Sequence[Result]) -> str:
    lines = ["| check | result | passed | failed | skipped | seconds | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        verdict = "failed" if result.status else "ok" if result.counts[0] else "skipped"
        counts = " | ".join(map(str, result.counts))
        lines.append(f"| {result.name} | {verdict} | {counts} | {result.seconds:.0f} | {result.note} |")
    return "\n".join(lines)


def main() -> int:
    names = [check.name for stage in stages() for check in stage]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--logs", type=Path, default=Path(os.environ.get("OUT", "/tmp/gpu-checks")))
    args = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        print("checks: there is no NVIDIA GPU here: nvidia-smi is not found", file=sys.stderr)
        return 1
    args.logs.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for stage in stages():
        chosen = [check for check in stage if check.name in args.only]
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            found = list(pool.map(lambda check: run(check, args.logs), chosen))
        for result in found:
            if result.status:
                shown = result.output.splitlines()[-SHOWN_LINES:]
                print(f"\n---- {result.name} failed ----", *shown, sep="\n", flush=True)
            elif result.name.startswith("time-"):
                print(f"\n---- {result.name} ----\n{result.output}", flush=True)
        results += found
    print(f"\n{machine()}\n\n{table(results)}", flush=True)
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
