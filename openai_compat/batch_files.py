"""Reads and writes the files of `microvllm run-batch`: one request or one answer per line."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import os
import shutil
import stat
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from microvllm.runtime.errors import ConfigError, reason_of

ADDRESS = ("http://", "https://")
STREAM = "-"  # in place of a path: stdin or stdout
DOWNLOAD_TIMEOUT_S = 60.0  # without a byte
UPLOAD_PAUSES_S = (1.0, 5.0, 15.0, 0.0)  # after each attempt that failed


class RequestFile:
    """The lines of a local file, of stdin (`-`) or of what an http(s) address holds; a context manager.

    What is not a regular file is copied to a temporary one first, so that the lines can be counted before
    the first is answered. `max_line` is in bytes, `tmp_dir` where the copy is made, if not in the system's
    folder. Raises `ConfigError` naming `-i` if it cannot be read.
    """

    def __init__(self, where: str, max_line: int, tmp_dir: str | None = None) -> None:
        self._max_line = max_line
        self._tmp_dir = tmp_dir
        self._open_files = contextlib.ExitStack()
        try:
            self._file = self._open(where)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._open_files.close()
            raise ConfigError(f"-i {where}: {reason_of(error)}") from error
        self.num_lines = sum(1 for _ in self)

    def _open(self, where: str) -> IO[bytes]:
        opened = self._open_files
        if where == STREAM:
            source = _standard(sys.stdin)
        elif where.startswith(ADDRESS):
            source = opened.enter_context(urllib.request.urlopen(where, timeout=DOWNLOAD_TIMEOUT_S))
        else:
            source = opened.enter_context(open(where, "rb"))  # noqa: SIM115 -- __exit__ closes it
            if stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                return source
        copy = opened.enter_context(tempfile.TemporaryFile(dir=self._tmp_dir))  # noqa: SIM115 -- __exit__ closes it
        shutil.copyfileobj(source, copy)
        return copy

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def __iter__(self) -> Iterator[bytes | None]:
        """Each line that is not blank, from the first one; None for one that is too long."""
        return (line for _, line in self.numbered())

    def numbered(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield the same with the number of each line, as editors count them."""
        self._file.seek(0)
        if self._file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            self._file.seek(0)
        number = 0
        while line := self._file.readline(self._max_line + 1):
            number += 1
            if len(line) > self._max_line:
                while line and not line.endswith(b"\n"):
                    line = self._file.readline(1 << 20)
                yield number, None
            elif line := line.strip():
                yield number, line

    def is_same_file(self, where: str) -> bool:
        """Return whether `where` is the path of this very file, by whatever name."""
        with contextlib.suppress(OSError, ValueError):
            return where != STREAM and os.path.samestat(os.fstat(self._file.fileno()), os.stat(where))
        return False


class AnswerFile:
    """Where the answers go: a file, stdout (`-`) or an http(s) address; a context manager.

    It is opened before the model loads, to see that it can be, and emptied by `start`. Every line is
    handed to the system at once, so that a run that is cut short keeps what it has done. For an address the
    answers are collected in a file of `tmp_dir` (or of the system's folder) and sent with PUT at the end.
    Raises `ConfigError` naming `-o`.
    """

    def __init__(self, where: str, tmp_dir: str | None = None) -> None:
        self._where = where
        self._staged: Path | None = None
        try:
            if where == STREAM:
                self._file = _standard(sys.stdout)
            elif where.startswith(ADDRESS):
                handle, name = tempfile.mkstemp(".jsonl", "answers-", tmp_dir)
                self._file, self._staged = os.fdopen(handle, "wb"), Path(name)
            else:
                self._file = open(where, "ab")  # noqa: SIM115 -- __exit__ closes it
        except (OSError, ValueError) as error:
            raise ConfigError(f"-o {where}: {reason_of(error)}") from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._where != STREAM:
                self._file.close()
        except OSError as error:
            if kind is None:  # else what could not be written was reported already
                raise ConfigError(f"-o {self._where}: {reason_of(error)}") from error
        if self._staged is not None:
            if kind is None:
                _upload(self._staged, self._where)
            self._staged.unlink()

    def start(self) -> None:
        """Forget what an earlier run has left."""
        if self._where != STREAM and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.truncate(0)

    def write(self, line: bytes) -> None:
        try:
            self._file.write(line + b"\n")
            self._file.flush()
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough
        except OSError as error:
            raise ConfigError(f"-o {self._where}: {reason_of(error)}") from error


def _upload(file: Path, address: str) -> None:
    """PUT the file there. Raises `ConfigError`, and leaves the file, when no attempt succeeds."""
    for pause in UPLOAD_PAUSES_S:
        try:
            with file.open("rb") as content:
                headers = {"Content-Type": "application/jsonl", "Content-Length": str(file.stat().st_size)}
                request = urllib.request.Request(address, content, headers, method="PUT")
                urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S).close()
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = reason_of(error)
            time.sleep(pause)
    raise ConfigError(f"-o {address}: {reason}", remedy=f"the answers are kept in {file}")


def _standard(stream: TextIO | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("this process has none")  # it was started with `<&-` or `>&-`
    return stream.buffer
