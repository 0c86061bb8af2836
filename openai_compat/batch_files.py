"""The files of `microvllm run-batch`: requests, one a line, and answers, one a line."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import os
import shutil
import stat
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import IO, TextIO

from microvllm.runtime.errors import ConfigError

STREAM = "-"  # in place of a path: stdin or stdout
DOWNLOAD_TIMEOUT_S = 60.0  # without a byte


class RequestFile:
    """The lines of a local file, of stdin (`-`) or of what an http(s) address holds; a context manager.

    What is not a regular file is copied to a temporary one first, so that the lines can be counted before
    the first is answered. `max_line` is in bytes. Raises `ConfigError` naming `-i` if it cannot be read.
    """

    def __init__(self, where: str, max_line: int) -> None:
        self._max_line = max_line
        self._open_files = contextlib.ExitStack()
        try:
            self._file = self._open(where)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._open_files.close()
            raise ConfigError(f"-i {where}: {_reason(error)}") from error
        self.num_lines = sum(1 for _ in self)
        if not self.num_lines:
            self._open_files.close()
            raise ConfigError(f"-i {where}: there is no request in it")

    def _open(self, where: str) -> IO[bytes]:
        opened = self._open_files
        if where == STREAM:
            source = _standard(sys.stdin)
        elif where.startswith(("http://", "https://")):
            source = opened.enter_context(urllib.request.urlopen(where, timeout=DOWNLOAD_TIMEOUT_S))
        else:
            source = opened.enter_context(open(where, "rb"))  # noqa: SIM115 -- __exit__ closes it
            if stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                return source
        copy = opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 -- __exit__ closes it
        shutil.copyfileobj(source, copy)
        return copy

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def __iter__(self) -> Iterator[bytes | None]:
        """Each line that is not blank, from the first one; None for one that is too long."""
        self._file.seek(0)
        if self._file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            self._file.seek(0)
        while line := self._file.readline(self._max_line + 1):
            if len(line) > self._max_line:
                while line and not line.endswith(b"\n"):
                    line = self._file.readline(1 << 20)
                yield None
            elif line := line.strip():
                yield line

    def is_same_file(self, where: str) -> bool:
        """Whether `where` is the path of this very file, by whatever name."""
        with contextlib.suppress(OSError, ValueError):
            return where != STREAM and os.path.samestat(os.fstat(self._file.fileno()), os.stat(where))
        return False


class AnswerFile:
    """Where the answers go: a file, or stdout (`-`); a context manager.

    It is opened before the model loads, to see that it can be, and emptied by `start`. Every line is
    handed to the system at once, so that a run that is cut short keeps what it has done.
    Raises `ConfigError` naming `-o`.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        if where.startswith(("http://", "https://")):
            raise ConfigError(
                f"-o {where}: answers are written to a file or to stdout (-), not to an address"
            )
        try:
            if where == STREAM:
                self._file = _standard(sys.stdout)
            else:
                self._file = open(where, "ab")  # noqa: SIM115 -- __exit__ closes it
        except (OSError, ValueError) as error:
            raise ConfigError(f"-o {where}: {_reason(error)}") from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._where != STREAM:
                self._file.close()
        except OSError as error:
            if kind is None:  # else what could not be written was reported already
                raise ConfigError(f"-o {self._where}: {_reason(error)}") from error

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
            raise ConfigError(f"-o {self._where}: {_reason(error)}") from error


def _standard(stream: TextIO | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("this process has none")  # it was started with `<&-` or `>&-`
    return stream.buffer


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
