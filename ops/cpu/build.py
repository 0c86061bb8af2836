"""Compiles the C files of this folder into one library at first use, and keeps the result."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.c"))
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math"),
    # GCC tuned for Zen leaves multiply and add apart where one sum follows another, which the kernels' own
    # partial sums make needless.
    "--param=avoid-fma-max-bits=0",
)
COMPILE_TIMEOUT_S = 120


class NoCompilerError(Exception):
    """The kernels cannot be built here; the message is one line that says why."""


def find_compiler() -> str | None:
    """The command of the C compiler: $CC, or the first of cc, gcc and clang that there is."""
    return os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)


def load_kernels() -> ctypes.CDLL:
    """The compiled kernels, from the cache if this source was compiled on this kind of CPU before.

    Takes about two seconds the first time. The cache is `microvllm` under $XDG_CACHE_HOME or ~/.cache, or a
    private folder under the temporary one.
    Raises `NoCompilerError` when there is no C compiler or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError("there is no C compiler (cc, gcc or clang)")
    text = b"".join(path.read_bytes() for path in [*SOURCES, *sorted(FOLDER.glob("*.h"))])
    key = hashlib.sha256(text + repr((compiler, FLAGS, _cpu_flags())).encode()).hexdigest()
    library = _cache_folder() / f"kernels-{key[:16]}.so"
    if not library.exists():
        _compile(compiler, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompilerError(f"{library} cannot be loaded: {error}") from error


def _cache_folder() -> Path:
    """A folder of the user's own that can be written: what is loaded from it runs in this process."""
    wishes = [os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache")]
    for wish in filter(None, wishes):
        folder = Path(wish) / "microvllm"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"microvllm-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise NoCompilerError(f"there is no folder to keep compiled kernels in: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise NoCompilerError(f"{folder} is not a private folder of this user")
    return folder


def _compile(compiler: str, library: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            target = Path(folder) / library.name
            subprocess.run(
                [*compiler.split(), *FLAGS, *map(str, SOURCES), "-o", str(target), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            target.replace(library)  # in one step, as several processes may compile at once
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        raise NoCompilerError(f"{compiler} failed: {lines[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{compiler} failed: {error}") from error


def _cpu_flags() -> str:
    """What the processor can do: code compiled for one may be illegal on another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
