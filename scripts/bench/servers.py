"""Starts the server of an engine, waits for it, measures and halts it, and ends all of its processes.

Reads /proc, so Linux only.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.engines import LISTEN, Engine
from microvllm.openai_compat.bench.client import (
    BenchError,
    Completion,
    Measured,
    RequestResult,
    User,
    measure,
)
from microvllm.openai_compat.bench.workloads import random_ids, random_texts

LOG_LINES = 5
GRACE_S = 15.0
"""Seconds in which a server may end by itself."""
METRICS_TIMEOUT_S = 10.0
SERVE_START_S = 600.0


class Server:
    """The processes of an engine are those of one session of the operating system.

    An engine with a URL runs somewhere else: it has no processes here, and is left alone.
    """

    def __init__(self, engine: Engine, logs: Path, log: Path | None = None) -> None:
        """Starts it, its output in `log` or in a file of its name in `logs`.

        Raises `BenchError` if the program cannot be started.
        """
        self.engine = engine
        self.ready_s = 0.0
        """Seconds from its start to its first token, once `wait_ready` has returned."""
        self._process: subprocess.Popen[bytes] | None = None
        self._started = time.perf_counter()
        self._log_start = 0
        self.log = log or logs / f"{engine.name}.log".replace("/", "-").replace(" ", "-")
        if engine.url:
            self.target = engine.target(engine.url)
            return
        self.port = _free_port()
        self.target = engine.target(f"http://127.0.0.1:{self.port}")
        command = engine.command_at(self.port)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **engine.environment},
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"cannot start {command[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Its first process, of microvllm the API process."""
        assert self._process is not None
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it has given its first token. Raises `BenchError`."""
        while True:
            make = random_ids if self.engine.offline else random_texts
            prompt = Completion(make([4], time.monotonic_ns())[0], 1)
            left = max(0.1, self._started + timeout_s - time.perf_counter())
            answer = self.measure([prompt], timeout_s=left)
            passed = time.perf_counter() - self._started
            failure = answer.requests[0].error
            if not failure:
                self.ready_s = passed
                return
            if self.ended():
                raise BenchError(f"ended while it started: {self.last_words()}")
            if passed > timeout_s:
                raise BenchError(f"no answer within {timeout_s:.3g} s: {failure}")
            if failure.startswith("HTTP status 4"):
                raise BenchError(failure)
            time.sleep(0.1)

    def measure(self, users: Sequence[User], *, timeout_s: float, **load: Any) -> Measured:
        """Measure the users under a load (see `client.measure`); an offline engine gets them in one call."""
        if not self.engine.offline:
            return measure(self.target, users, timeout_s=timeout_s, **load)
        asked = [user for user in users if isinstance(user, Completion)]
        body = {"prompts": [user.prompt for user in asked], "lengths": [user.output_len for user in asked]}
        try:
            answer = json.loads(_http(f"{self.target.url}/generate", timeout_s, json.dumps(body).encode()))
        except (OSError, ValueError) as error:
            return Measured([RequestResult(f"cannot generate: {error}")], timeout_s, 0.0)
        results = []
        for user, tokens in zip(asked, answer["tokens"], strict=True):
            short = f"{tokens} tokens in place of {user.output_len}" if tokens != user.output_len else ""
            results.append(RequestResult(short, prompt_tokens=len(user.prompt), completion_tokens=tokens))
        return Measured(results, answer["seconds"], 0.0)

    def metrics(self) -> str:
        """The text of its /metrics; "" if it has none."""
        with suppress(OSError):
            return _http(f"{self.target.url}/metrics", METRICS_TIMEOUT_S)
        return ""

    def ended(self) -> bool:
        """Whether its first process has ended."""
        return self._process is not None and self._process.poll() is not None

    def last_words(self) -> str:
        """The last lines of its log, in one line."""
        text = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = text.strip().splitlines()[-LOG_LINES:]
        return f"{' / '.join(line.strip()[:200] for line in lines)} (its log: {self.log})"

    def processes(self) -> list[int]:
        """Ids of its processes."""
        found = []
        for entry in Path("/proc").iterdir() if self._process else ():
            if entry.name.isdecimal():
                fields = _stat(int(entry.name))
                if fields and self._process and int(fields[3]) == self._process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    @property
    def engine_pid(self) -> int:
        """Of microvllm the engine process."""
        return next(
            pid for pid in self.processes() if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )

    def cpu_seconds(self) -> float:
        """Processor time that its processes have taken so far."""
        ticks = 0
        for process in self.processes():
            fields = _stat(process)
            ticks += int(fields[11]) + int(fields[12]) if fields else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes of its processes; a page that several share counts once (PSS)."""
        total = 0
        for process in self.processes():
            try:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue  # it has just ended
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def halt(self) -> None:
        """Take the processor away from it until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Send it SIGTERM, without waiting."""
        self.resume()
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """End it and everything it has started; returns when all is gone."""
        self.terminate()
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            self._signal(signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(process, number)


def stop_all(servers: Sequence[Server]) -> None:
    """End servers side by side; an interrupt in the meantime is passed over, so that none is left behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for server in servers:
            server.terminate()
        for server in servers:
            server.stop()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def serving(model: str, *flags: str, log: Path | None = None) -> Iterator[Server]:
    """Run `microvllm serve` during the block. Raises `BenchError` if it does not start."""
    command = [sys.executable, "-m", "microvllm", "serve", "--model", model, *LISTEN]
    command += ["--disable-uvicorn-access-log", *flags]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Engine("microvllm", "", "", command, model=None), Path(folder), log)
        try:
            server.wait_ready(SERVE_START_S)
            yield server
        finally:
            stop_all([server])


def memory_of(pid: int, field: str = "VmRSS") -> int:
    """Bytes of a field of /proc/PID/status, by default resident ones; 0 for a process that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return 0


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Delay the signals that end this process until the block is left.

    Between the start of a process and the moment we have its id, a signal would leave the process behind.
    """
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _http(url: str, timeout_s: float, data: bytes | None = None) -> str:
    """The body of a GET, or of a POST of `data`. Raises `OSError`, also for a status that is no success."""
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=timeout_s) as answer:
        return str(answer.read().decode(errors="replace"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stat(process: int) -> list[str]:
    """The fields of /proc/ID/stat from the state on; empty if there is no such process any more."""
    try:
        # The name before them is in brackets and may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that never rests, for as long as the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
