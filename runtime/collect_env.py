"""Reports on this machine and this installation for bug reports: `microvllm collect-env`.

Every part is gathered by itself: a broken torch or driver is a line of the report, not the end of it.
Values of environment variables that may be secrets are left out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import microvllm
from microvllm.ops.cpu.build import find_compiler, load_kernels
from microvllm.runtime import machine

Rows = list[tuple[str, str]]

COMMAND_TIMEOUT_S = 20.0
WIDTH = 110
VARIABLES = re.compile(
    r"(MICROVLLM|VLLM|OPENAI|HF|TRANSFORMERS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NVIDIA|NCCL|OMP|GOMP|KMP"
    r"|MKL|OPENBLAS|UVICORN|PYTHON)_?\w*|CC|CFLAGS|LD_\w+|PATH|XDG_CACHE_HOME|LANG|LC_ALL|VIRTUAL_ENV|\w+_proxy",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def report() -> str:
    """Return the whole report, several sections of `name: value` lines."""
    parts: dict[str, Callable[[], Rows]] = {
        "microvllm": _installation,
        "System": _system,
        "GPU": _gpu,
        "torch.utils.collect_env": _torch,
        "Kernels for the CPU": _kernels,
        "Packages": _packages,
        "Environment variables": _variables,
    }
    lines = []
    for title, part in parts.items():
        try:
            rows = part()
        except Exception as error:  # whatever is broken here is what the report is for
            rows = [("not known", f"{type(error).__name__}: {error}")]
        lines += [title, *_layout(rows), ""]
    return "\n".join(lines[:-1])


def _layout(rows: Rows) -> Iterable[str]:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        yield from textwrap.wrap(
            " ".join(value.split()),
            WIDTH,
            initial_indent=f"  {name:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
            break_long_words=False,
        ) or [f"  {name}"]


def _installation() -> Rows:
    folder = Path(microvllm.__file__).parent
    rows = [("version", microvllm.__version__), ("folder", str(folder))]
    commit = None
    if (folder / ".git").exists():
        commit = _output("git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty")
    else:  # pip notes which commit it has installed from
        found = metadata.distribution("microvllm").read_text("direct_url.json")
        origin: dict[str, Any] = json.loads(found or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
    return [*rows, ("commit", commit or "not known")]


def _system() -> Rows:
    cores = f"{machine.usable_cores()} usable of {os.cpu_count()}"
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        cores += f", limited to the time of {int(quota) / int(period):g} by the cgroup"
    sizes = dict(re.findall(r"^(MemTotal|SwapTotal):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    limit = _read("/sys/fs/cgroup/memory.max")
    return [
        ("platform", platform.platform()),
        ("Python", f"{sys.version} ({sys.executable})"),
        ("cores", cores),
        ("total memory", _gib(int(sizes["MemTotal"]) << 10) if sizes else "not known"),
        ("swap", _gib(int(sizes["SwapTotal"]) << 10) if sizes else "not known"),
        ("cgroup's limit", _gib(int(limit)) if limit.isdecimal() else "none"),
        ("free for us", _gib(machine.available_memory())),
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _gpu() -> Rows:
    fields = "name,memory.total,driver_version,compute_cap"
    listed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    if listed is None:
        return [("nvidia-smi", "not there, or it fails")]
    return [(f"GPU {index}", line) for index, line in enumerate(listed.splitlines())]


def _torch() -> Rows:
    """Ask torch about itself, the compilers, the processor and the GPUs."""
    from torch.utils.collect_env import get_pretty_env_info

    lines = [line.partition(":") for line in get_pretty_env_info().splitlines()]  # type: ignore[no-untyped-call]
    return [(name, value.strip()) for name, _, value in lines if name.strip()]


def _kernels() -> Rows:
    compiler = find_compiler()
    version = _output(*compiler.split(), "--version") if compiler else None
    rows = [("compiler", compiler or "none (cc, gcc, clang)")]
    if version:
        rows.append(("its version", version.splitlines()[0]))
    try:
        library = load_kernels()
    except Exception as error:
        return [*rows, ("built", f"no: {error}")]
    from microvllm.ops.cpu.calibration import calibrated  # imports torch, which may be what is broken

    rows.append(("built", f"yes, {library._name}"))
    return [*rows, ("chosen by measurement", str(calibrated(library)))]


def _packages() -> Rows:
    """List what we depend on, with the installed ones of our extras, and all else that is installed."""
    rows: Rows = []
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in metadata.distributions()}
    for requirement in map(Requirement, metadata.requires("microvllm") or []):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version = installed.pop(canonicalize_name(requirement.name), None)
        if not (needed or version):
            continue
        fits = version is None or requirement.specifier.contains(version, prereleases=True)
        need = f" (needs {requirement.specifier})" if not fits else ""
        rows.append((requirement.name, (version or "not installed") + need))
    return [*rows, ("and beside them", ", ".join(map(" ".join, sorted(installed.items()))))]


def _variables() -> Rows:
    rows = []
    for name, value in sorted(os.environ.items()):
        if VARIABLES.fullmatch(name):
            hidden = SECRET_NAME.search(name) is not None
            rows.append((name, "(set, not shown)" if hidden else SECRET_IN_ADDRESS.sub("***", value)))
    return rows


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
