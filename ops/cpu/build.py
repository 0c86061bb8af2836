"""Compiles the C files of this folder into one library at first use, and keeps the result."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from microvllm.ops.cache import cache_folders, is_trusted, lacks_room, warn_once
from microvllm.ops.cpu.isa import Level, usable_levels

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.c"))
HEADERS = sorted(FOLDER.glob("*.h"))
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math"),
    # GCC tuned for Zen leaves multiply and add apart where one sum follows another, which the kernels' own
    # partial sums make needless.
    "--param=avoid-fma-max-bits=0",
)
COMPILE_TIMEOUT_S = 300
ROOM_BYTES = 16 << 20  # of the compiler's intermediate files; the library takes half a megabyte
COMPILER_REMEDY = "install a C compiler (apt-get install gcc)"


class NoCompilerError(Exception):
    """The kernels cannot be built here; the message is one line that says why, `remedy` what to do."""

    def __init__(self, message: str, remedy: str = COMPILER_REMEDY) -> None:
        super().__init__(message)
        self.remedy = remedy


def find_compiler() -> str | None:
    """The command of the C compiler: $CC, or the first of cc, gcc and clang that there is."""
    return os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)


def check_compiler() -> None:
    """Raises `NoCompilerError` when there is no C compiler, `IsaError` for a level that is not there."""
    next(usable_levels())
    if find_compiler() is None:
        raise NoCompilerError("there is no C compiler (cc, gcc or clang)")


def load_kernels(on_compile: Callable[[], None] | None = None) -> ctypes.CDLL:
    """The compiled kernels for the best level of this processor, from the cache if they were compiled before.

    Takes about two seconds the first time, which `on_compile` announces. The cache is `microvllm` under
    $XDG_CACHE_HOME or ~/.cache, or a private folder under the temporary one.
    Raises `NoCompilerError` when there is no C compiler or it fails, `IsaError` for a level that is not
    there.
    """
    failure = NoCompilerError("the compiled kernels do not run on this processor")
    for level in usable_levels():
        try:
            path = build_kernels(level, on_compile)
        except NoCompilerError as error:  # it may be older than the processor
            logger.info("no kernels for %s: %s", level.name, error)
            failure = error
            continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoCompilerError(f"{path} cannot be loaded: {error}") from error
        if library.runs_here():
            return library
    raise failure


def build_kernels(level: Level, on_compile: Callable[[], None] | None = None) -> Path:
    """The library of one level, compiled unless the cache has it. Raises `NoCompilerError`."""
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError("there is no C compiler (cc, gcc or clang)")
    command = [*compiler.split(), *FLAGS, *level.flags]
    text = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    key = hashlib.sha256(text + repr((command, platform.machine())).encode()).hexdigest()
    name = f"kernels-{level.name}-{key[:16]}.so"
    folders: list[Path] = []
    try:
        for folder in cache_folders():
            if is_trusted(folder / name):
                return folder / name  # before the folder under the temporary one is made
            if folder not in folders:
                folders.append(folder)
    except OSError as error:
        raise NoCompilerError(f"there is no folder to keep compiled kernels in: {error}") from error
    library = _folder_with_room(folders) / name
    if on_compile is not None:
        on_compile()
    _compile(command, library)
    return library


def _folder_with_room(folders: list[Path]) -> Path:
    """Return the first folder that the compiler has room in. Raises `NoCompilerError`."""
    full: dict[Path, str] = {}
    for folder in folders:
        reason = lacks_room(folder, ROOM_BYTES)
        if reason is None:
            for each, why in full.items():
                warn_once(f"compiled kernels are not kept in {each}, but in {folder}: {why}")
            return folder
        full[folder] = reason
    raise NoCompilerError(
        "kernels cannot be compiled: " + "; ".join(f"{folder}: {why}" for folder, why in full.items()),
        f"free {ROOM_BYTES >> 20} MB there, or name a folder elsewhere with XDG_CACHE_HOME",
    )


def _compile(command: list[str], library: Path) -> None:
    """Every source by a compiler of its own, at once, then all of them into the library."""

    def run(*arguments: str) -> None:
        subprocess.run(
            [*command, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            env=os.environ | {"TMPDIR": folder},  # where there is room
        )

    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor() as threads:
            objects = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES]
            list(threads.map(run, repeat("-c"), map(str, SOURCES), repeat("-o"), objects))
            target = Path(folder) / library.name
            run("-shared", *objects, "-o", str(target), "-lm")
            target.chmod(0o700)
            target.replace(library)  # in one step, as several processes may compile at once
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        # The assembler writes a heading first, and warnings may stand there, too.
        cause = next((line for line in lines if "error" in line.lower()), lines[0])
        raise NoCompilerError(f"{command[0]} failed: {cause}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{command[0]} failed: {error}") from error
