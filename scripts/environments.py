"""Installs programs of others, each into an environment of its own, and runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

RUN_TIMEOUT_S = 300.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def run(command: list[str], folder: Path, environment: dict[str, str], timeout: float = RUN_TIMEOUT_S) -> str:
    """Return the output of a command; raises `RuntimeError` with its end if it fails or takes too long."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PWD": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # an agent may leave programs behind that hold the pipe
        output, _ = process.communicate()
        raise RuntimeError(f"took longer than {timeout:.0f} s: {output[-2000:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {output[-3000:]}")
    return output


def install(name: str, packages: tuple[str, ...], npm: bool, folder: Path) -> tuple[Path, str]:
    """Return the folder of an environment's programs, and the version of its first package."""
    place, stamp = folder / name, folder / name / ".installed"
    wanted = " ".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if npm:
            run(["npm", "install", "--silent", "--no-fund", "--no-audit", *packages], place, {}, 900)
        else:
            run([sys.executable, "-m", "venv", "."], place, {})
            run(
                ["bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages],
                place,
                {},
                900,
            )
        stamp.write_text(wanted)
    first = packages[0]
    if npm:
        package = first if first.rfind("@") <= 0 else first[: first.rfind("@")]
        card = json.loads((place / "node_modules" / package / "package.json").read_text())
        return place / "node_modules" / ".bin", card["version"]
    package = first.split("[")[0].split("<")[0].split("=")[0].split("~")[0]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return place / "bin", run(["bin/python", "-c", code], place, {}).strip()
