#!/usr/bin/env python3
"""Measure how a server stands up to faults and to those who mean it harm, and print one table.

    python scripts/security_faults.py [--model NAME] [--only WORD] [-- FLAGS OF serve]

Starts `microvllm serve` on a free port for each group of rows that needs one. Each row is a figure, its
target and what was measured. Exit status 1 if a figure misses its target. A group is a function that yields
rows; `--only` runs those whose name holds the word.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

ROOT = Path(__file__).resolve().parent.parent
START_S = 600.0
MIB = 1 << 20
SAMPLE_S = 0.02
HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
)
TRAILER_CONNECTIONS, TRAILER_BYTES = 20, 5 * MIB
BODY_CONNECTIONS, BODY_BYTES = 60, 15 * MIB


class Row(NamedTuple):
    figure: str
    target: str
    measured: str
    met: bool


class Server:
    """`microvllm serve` on a free port, and the resident memory of its API process."""

    def __init__(self, args: argparse.Namespace, *flags: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "microvllm",
            "serve",
            "--model",
            args.model,
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(
            [*command, *flags, *args.flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if self.http.get("/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit("security_faults: the server does not start")

    def resident(self) -> int:
        return memory_of(self.process.pid, "VmRSS")


@contextmanager
def serving(args: argparse.Namespace, *flags: str) -> Iterator[Server]:
    server = Server(args, *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


@contextmanager
def watching(server: Server) -> Iterator[list[float]]:
    """Asks for /health all the time: the seconds of each answer, infinite for one that failed."""
    seconds: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.http.base_url, timeout=60, trust_env=False) as http:
            while not done.wait(SAMPLE_S):
                start = time.monotonic()
                try:
                    good = http.get("/health").status_code == 200
                except httpx.HTTPError:
                    good = False
                seconds.append(time.monotonic() - start if good else float("inf"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


def memory_of(pid: int, field: str) -> int:
    """Bytes of a field of /proc/PID/status, 0 for a process that is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return 0


def health(during: str, seconds: list[float]) -> Row:
    worst = max(seconds, default=float("inf"))
    return Row(f"/health during {during}, worst", "1 s", f"{worst:.2f} s of {len(seconds)}", worst < 1)


def trailers(args: argparse.Namespace) -> Iterator[Row]:
    """Chunked bodies that go on with trailers for ever, short ones and one without an end."""
    head = HEAD.format(framing="Transfer-Encoding: chunked").encode() + b"2\r\n{}\r\n0\r\n"
    with serving(args) as server, watching(server) as seconds:
        before, most, sent = server.resident(), 0, 0
        for number in range(TRAILER_CONNECTIONS):
            endless = b"X: " + b"y" * MIB if number % 2 else b"X: y\r\n" * (MIB // 6)
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 10) as sock:
                sock.sendall(head)
                for _ in range(TRAILER_BYTES // MIB):
                    sock.sendall(endless)
                    sent += MIB
            most = max(most, server.resident() - before)
        figure = f"memory for {TRAILER_CONNECTIONS} bodies with {TRAILER_BYTES // MIB} MB of trailers"
        yield Row(figure, "10 MB", f"{most / MIB:.1f} MB, {sent // MIB} MB sent", most < 10 * MIB)
        time.sleep(0.5)
    yield health("trailers", seconds)


def unfinished_bodies(args: argparse.Namespace) -> Iterator[Row]:
    """Bodies that stop before their end, from many connections at once."""
    head = HEAD.format(framing=f"Content-Length: {BODY_BYTES + 1}").encode()
    with serving(args) as server, watching(server) as seconds:
        before, socks = server.resident(), []
        for _ in range(BODY_CONNECTIONS):
            sock = socket.create_connection(("127.0.0.1", server.port), 10)
            socks.append(sock)
            with suppress(OSError):
                sock.sendall(head + b" " * BODY_BYTES)
        time.sleep(1)
        grown = server.resident() - before
        for sock in socks:
            sock.close()
        figure = f"memory for {BODY_CONNECTIONS} unfinished bodies of {BODY_BYTES // MIB} MB"
        yield Row(figure, "200 MB", f"{grown / MIB:.0f} MB", grown < 200 * MIB)
    yield health("unfinished bodies", seconds)


def template_bombs(args: argparse.Namespace) -> Iterator[Row]:
    """Templates that would run for ever or take all memory, rendered as the server renders them."""
    sys.path.insert(0, str(ROOT / "tests" / "text"))
    from template_bombs import bombs

    from microvllm.runtime.errors import InvalidRequestError
    from microvllm.runtime.text.template_process import SandboxProcesses

    found = list(bombs())
    sandbox = SandboxProcesses()
    sandbox.content_format("")  # the processes start
    done, most = threading.Event(), 0

    def sample() -> None:
        nonlocal most
        while not done.wait(SAMPLE_S):
            for children in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):
                    for pid in children.read_text().split():
                        most = max(most, memory_of(int(pid), "VmHWM"))

    def render(source: str) -> float:
        start = time.monotonic()
        with suppress(InvalidRequestError):
            sandbox.render(source, {"messages": [{"role": "user", "content": "hi"}]})
        return time.monotonic() - start

    thread = threading.Thread(target=sample)
    thread.start()
    times = [render(source) for _, source in found]
    done.set()
    thread.join()
    yield Row(f"{len(found)} template bombs, longest", "5 s", f"{max(times):.2f} s", max(times) < 5)
    yield Row(f"{len(found)} template bombs, most memory", "1 GB", f"{most / MIB:.0f} MB", most < 1 << 30)
    yield from _served_bombs(args, found)


def _served_bombs(args: argparse.Namespace, found: list[tuple[str, str]]) -> Iterator[Row]:
    # What the compiler computes by itself is a bomb for every conversation: here each is a branch.
    kinds = ("compares", "prints", "doubles")
    whole = [(kind, source) for kind, source in found if kind.split()[0] in kinds][::6]
    branches = [
        f"{{% if messages[0].content == '{i}' %}}{each}{{% endif %}}" for i, (_, each) in enumerate(whole)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
        file.write("".join(branches) + "{{ messages[0].content }}")
        file.flush()
        with serving(args, "--chat-template", file.name) as server, watching(server) as seconds:

            def chat(content: object) -> tuple[int, float]:
                body = {"messages": [{"role": "user", "content": str(content)}], "max_tokens": 1}
                start = time.monotonic()
                return server.http.post(
                    "/v1/chat/completions", json=body
                ).status_code, time.monotonic() - start

            answers = [chat(index) for index in range(len(whole))]
            refused = [took for status, took in answers if status == 400]
            yield Row(
                f"{len(answers)} of them by HTTP, longest",
                "5 s, 400 each",
                f"{max(took for _, took in answers):.2f} s, {len(refused)} x 400",
                len(refused) == len(answers) and max(refused) < 5,
            )
            yield Row("the next chat", "200", str(chat("hi")[0]), chat("hi")[0] == 200)
        yield health("template bombs", seconds)


GROUPS: tuple[Callable[[argparse.Namespace], Iterator[Row]], ...] = (
    trailers,
    unfinished_bodies,
    template_bombs,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", default="", metavar="WORD")
    argv = sys.argv[1:]
    own = argv[: argv.index("--")] if "--" in argv else argv
    args = parser.parse_args(own)
    args.flags = argv[len(own) + 1 :]
    os.environ.pop("MICROVLLM_API_KEY", None)
    print("| figure | target | measured | |\n|---|---|---|---|")
    met = True
    for group in GROUPS:
        if args.only in group.__name__:
            for row in group(args):
                print(
                    f"| {row.figure} | {row.target} | {row.measured} | {'' if row.met else 'missed'} |",
                    flush=True,
                )
                met &= row.met
    sys.exit(not met)


if __name__ == "__main__":
    main()
