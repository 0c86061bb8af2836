"""Finds the folder that keeps what is made once: compiled kernels, tokenizer files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return a folder of the user's own that can be written, as what is loaded from it runs in this process.

    It is `microvllm` under $XDG_CACHE_HOME or ~/.cache, or a private folder under the temporary one.
    Raises `OSError` when there is none.
    """
    for base in filter(None, (os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache"))):
        folder = Path(base) / "microvllm"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"microvllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise PermissionError(f"{folder} is not a private folder of this user")
    return folder
