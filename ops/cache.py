"""Finds the folder that keeps what is made once: compiled kernels, their calibration, tokenizer files."""

from __future__ import annotations

import atexit
import functools
import grp
import logging
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("microvllm.cache")


def cache_folders() -> Iterator[Path]:
    """Yields folders that nobody else can change, as what is loaded from them runs in this process.

    The first is `microvllm` under $XDG_CACHE_HOME or ~/.cache. Where others can change that or a folder on
    the way to it, a line is logged, and it is left out. The last is a folder of mode 0700 under the temporary
    one. Raises `OSError` where no folder can be made.
    """
    for base in filter(None, (os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"))):
        folder = Path(base) / "microvllm"
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            problem = folder_problem(folder)
        except OSError:
            continue
        if problem is not None:
            warn_once(f"compiled kernels are not kept in {folder}, but in {_private_folder()}: {problem}")
            break
        if os.access(folder, os.W_OK | os.X_OK):
            yield folder
    yield _private_folder()


def lacks_room(folder: Path, size: int) -> str | None:
    """Returns why `size` bytes cannot be written into a folder, None if they can.

    They are written, as a quota does not show in the free space.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
    except OSError as error:
        return error.strerror
    return None


def is_trusted(file: Path) -> bool:
    """Whether a file in the cache is a regular one that only this user or root can change."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(status.st_mode) and _is_safe(status):
        return True
    warn_once(f"{file} is not used, since others can change it, and is made anew")
    return False


def folder_problem(folder: Path) -> str | None:
    """Returns which folder on the way others can change, None if there is none. Raises `OSError`."""
    absolute = Path(os.path.abspath(folder))
    real = absolute.resolve()
    for each in dict.fromkeys((*reversed(absolute.parents), absolute, *reversed(real.parents), real)):
        status = each.stat()
        # Under a sticky folder (/tmp) nobody can replace what is another's.
        sticky = each not in (absolute, real) and status.st_mode & stat.S_ISVTX and _is_ours(status)
        if not (sticky or _is_safe(status)):
            return f"other users can change {each}"
    return None


def _is_safe(status: os.stat_result) -> bool:
    shared = status.st_mode & stat.S_IWOTH or (
        status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
    )
    return _is_ours(status) and not shared


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.getuid())


def _is_private_group(gid: int) -> bool:
    """Whether a group is root's or has this user alone, as many systems give one to each user."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return gid == 0 or (group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name})


def _private_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"microvllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return folder
    return _folder_of_this_process()  # another user was there first


@functools.cache
def _folder_of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="microvllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def warn_once(line: str) -> None:
    """Logs a line once."""
    logger.warning("%s", line)
