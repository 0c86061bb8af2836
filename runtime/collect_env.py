"""What a bug report needs to know about this machine and this installation: `microvllm collect-env`.

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
# What our kernels and torch's choose their code by.
CPU_FEATURES = """
    sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile
    amx_int8 amx_bf16 asimd asimddp i8mm bf16 sve sve2
""".split()
VARIABLES = re.compile(
    r"(MICROVLLM|VLLM|OPENAI|HF|TRANSFORMERS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NVIDIA|NCCL|OMP|GOMP|KMP"
    r"|MKL|OPENBLAS|UVICORN|PYTHON)_?\w*|CC|CFLAGS|LD_\w+|PATH|XDG_CACHE_HOME|LANG|LC_ALL|VIRTUAL_ENV|\w+_proxy",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def report() -> str:
    """The whole report, several sections of `name: value` lines."""
    parts: dict[str, Callable[[], Rows]] = {
        "microvllm": _installation,
        "System": _system,
        "Processor": _processor,
        "Memory": _memory,
        "GPU": _gpu,
        "torch": _torch,
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
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.platform()
    return [
        ("system", system),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("libc", " ".join(platform.libc_ver()).strip() or "not known"),
        ("Python", f"{sys.version} ({sys.executable})"),
    ]


def _processor() -> Rows:
    info = _read("/proc/cpuinfo")
    fields: dict[str, str] = dict(re.findall(r"^([\w ]+?)[ \t]*:[ \t]*(.*)$", info, re.MULTILINE))
    words = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or _output("sysctl", "-n", "machdep.cpu.brand_string")
    cores = f"{machine.usable_cores()} usable of {os.cpu_count()}"
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        cores += f", limited to the time of {int(quota) / int(period):g} by the cgroup"
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return [
        ("model", model or platform.processor() or "not known"),
        ("cores", cores),
        (
            "NUMA nodes",
            "; ".join(f"{file.parent.name}: cores {_read(file)}" for file in nodes) or "not known",
        ),
        ("features", " ".join(name for name in CPU_FEATURES if name in words) or "not known"),
    ]


def _memory() -> Rows:
    sizes = {
        name: f"{int(size) / 2**20:.1f} GiB"
        for name, size in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    }
    limit = _read("/sys/fs/cgroup/memory.max")
    return [
        ("total", sizes.get("MemTotal", "not known")),
        ("swap", sizes.get("SwapTotal", "not known")),
        ("cgroup's limit", f"{int(limit) / 2**30:.1f} GiB" if limit.isdecimal() else "none"),
        ("free for us", f"{machine.available_memory() / 2**30:.1f} GiB"),
    ]


def _gpu() -> Rows:
    fields = "name,memory.total,driver_version,compute_cap"
    listed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    if listed is None:
        return [("nvidia-smi", "not there, or it fails")]
    return [(f"GPU {index}", line) for index, line in enumerate(listed.splitlines())]


def _torch() -> Rows:
    import torch

    rows = [
        ("version", torch.__version__),
        ("built for CUDA", torch.version.cuda or "no"),
        ("threads", str(torch.get_num_threads())),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.1f} GiB"
            rows.append((f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}"))
    else:
        rows.append(("CUDA devices", "none that torch can use"))
    built = re.findall(r"^  - (?!Build settings)(.*)$", torch.__config__.show(), re.MULTILINE)
    return [*rows, ("built with", "; ".join(built))]


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
    """What we depend on, whatever it needs in turn, and what of our extras is installed."""
    rows: Rows = []
    seen = {"microvllm"}
    queue = []
    for requirement in map(Requirement, metadata.requires("microvllm") or []):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version = _version(requirement.name)
        name = canonicalize_name(requirement.name)
        if name in seen or not (wanted or version):
            continue
        seen.add(name)
        queue.append(name)
        fits = version is None or requirement.specifier.contains(version, prereleases=True)
        need = f" (needs {requirement.specifier})" if not fits else ""
        rows.append((requirement.name, (version or "not installed") + need))
    others = []
    while queue:
        for requirement in map(Requirement, _requires(queue.pop())):
            name = canonicalize_name(requirement.name)
            if name not in seen and (version := _version(name)) is not None:
                seen.add(name)
                queue.append(name)
                others.append(f"{requirement.name} {version}")
    return [*rows, ("and below them", ", ".join(sorted(others, key=str.lower)))]


def _variables() -> Rows:
    rows = []
    for name, value in sorted(os.environ.items()):
        if VARIABLES.fullmatch(name):
            hidden = SECRET_NAME.search(name) is not None
            rows.append((name, "(set, not shown)" if hidden else SECRET_IN_ADDRESS.sub("***", value)))
    return rows


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails or takes too long."""
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
