#!/usr/bin/env python3
"""Measure the API process alone: everything from the engine's step messages to bytes on the clients' sockets.

    python scripts/bench_frontend.py --streams 64 --output-len 2000

Starts the real server (uvicorn, Starlette, the engine client, the detokenizer) with a fake engine process
that speaks the real protocol over the real socket pair: one message a step, one token for every stream. The
engine sends its next step when the server has read the last one, or at `--steps-per-second`. A third process,
this one, reads the streams and counts their chunks.

The figure is token chunks per second of CPU time of the API process, which neighbours on the same machine
disturb less than the wall clock; both are printed. A token is a chunk of its own unless the server is so far
behind that it joins some, so the share of joined tokens is printed, too.
With `--running` the process of another server is measured, over its own engine: give as many streams
as it runs at once. With `--profile` py-spy (a program on its own) samples the API process, and the functions
that took the time are listed. Last comes one line of JSON. Exit status: 0, or 1 if tokens went missing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.engines import LISTEN, Engine
from bench.servers import Server, stop_all
from replaced_engine import replace_engine, serve

START_TIMEOUT_S = 120.0
READ_INTERVAL_S = 0.01
POLL_S = 100e-6  # of the fake engine, while the server has not read its last step
TEXT = (
    " The quick brown fox jumps over the lazy dog, and then it sleeps until the sun is high."
    ' "Well," said the dog, "that was not what I had in mind when we met this morning at the river."\n'
)


# ---- the fake engine --------------------------------------------------------------------------------


def run_engine(fd: int) -> None:
    """The engine process: handles the commands of the channel, makes tokens out of thin air."""
    from microvllm.runtime.metrics.stats import EngineStats
    from microvllm.runtime.process.channel import Abort, Add, EngineEnd, Ready, Start, Step
    from microvllm.runtime.request import FinishReason, StepOutput
    from microvllm.runtime.text.tokenizer import Tokenizer

    sock = socket.socket(fileno=fd)
    channel = EngineEnd(sock)
    with contextlib.suppress(EOFError, OSError):
        (start,) = channel.receive_commands(wait=True)
        if not isinstance(start, Start):
            raise TypeError(f"the first command must be Start, not {type(start).__name__}")
        tokens = Tokenizer.load(Path(start.config.tokenizer_path)).encode(TEXT, add_special_tokens=False)
        interval = 1.0 / float(os.environ["FAKE_STEPS_PER_SECOND"] or "inf")
        stats = EngineStats(kv_blocks_total=start.config.num_blocks)
        channel.send_event(Ready(stats, start.config.max_model_len))
        left: dict[int, int] = {}
        steps, due, arrived = 0, 0.0, 0
        while True:
            for command in channel.receive_commands(wait=not left):
                if isinstance(command, Add):
                    for samples in command.samples():
                        arrived += len(samples)
                        left |= {sample.request_id: sample.params.max_tokens or 1 for sample in samples}
                elif isinstance(command, Abort):
                    for request_id in command.request_ids:
                        left.pop(request_id, None)
            token = tokens[steps % len(tokens)]
            outputs = []
            for request_id, remaining in list(left.items()):
                last = remaining == 1
                outputs.append(StepOutput(request_id, [token], FinishReason.LENGTH if last else None))
                if last:
                    del left[request_id]
                else:
                    left[request_id] = remaining - 1
            steps += 1
            channel.send_event(
                Step(outputs, EngineStats(num_running=len(left), requests=arrived, steps=steps))
            )
            due = max(due + interval, time.monotonic() - interval)
            while left and (late := due - time.monotonic()) > 0:
                time.sleep(late)
            while left and unread(sock):
                time.sleep(POLL_S)


def unread(sock: socket.socket) -> int:
    """Bytes that the other side of a socket pair has not read yet, 0 once it is gone."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int.from_bytes(answer, sys.byteorder)


# ---- the server -------------------------------------------------------------------------------------


def run_server(arguments: list[str]) -> None:
    """The API process: `microvllm serve`, but the engine is the one above."""
    replace_engine(Path(__file__).resolve())
    serve(*arguments)


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A running server -> (its process id, its port); ends it. With `--running` one that is there already."""
    if args.running is not None:
        pid, _, port = args.running.partition(":")
        yield int(pid), int(port)
        return
    command = [sys.executable, str(Path(__file__).resolve()), "server", "--model", args.model, *LISTEN]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log", *args.server_arguments]
    environment = {"FAKE_STEPS_PER_SECOND": str(args.steps_per_second or "")}
    with tempfile.TemporaryDirectory() as logs:
        started = Server(Engine("microvllm", "", "", command, environment, model=None), Path(logs))
        try:
            started.wait_ready(START_TIMEOUT_S)
            yield started.pid, started.port
        except ConnectionError as error:
            raise SystemExit(f"{error}; the server's log ends: {started.last_words()}") from None
        finally:
            stop_all([started])


def cpu_seconds(pid: int) -> tuple[float, float]:
    """The time that a process has used: (its own code, the kernel on its behalf)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick: int = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


# ---- the client -------------------------------------------------------------------------------------


class Reader:
    """One stream: counts events, keeps nothing else but the last bytes."""

    def __init__(self, port: int, request: bytes) -> None:
        self.events = 0
        self.tokens = 0  # as the server counts them
        self.tail = b""
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.sendall(request)
        self.sock.setblocking(False)

    def read(self) -> bool:
        """Takes what has arrived -> whether the stream has ended. Raises `ConnectionError` if it broke."""
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                return False
            if not data:
                raise ConnectionError(f"a stream broke after {self.events} events: {self.tail!r}")
            # One byte less than the mark from before, so that nothing is counted twice.
            self.events += (self.tail[-6:] + data).count(b"data: {")
            self.tail = (self.tail + data)[-1024:]
            if b"[DONE]" in self.tail[-64:]:
                counted = re.search(rb'"completion_tokens":(\d+)', self.tail)
                self.tokens = int(counted[1]) if counted else 0
                self.sock.close()
                return True


def request_bytes(args: argparse.Namespace) -> bytes:
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"ignore_eos": True, "max_tokens": args.output_len}
    if args.endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "/v1/completions", "Hello!"
    body |= json.loads(args.extra_body)
    data = json.dumps(body).encode()
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
    )


def stream_all(args: argparse.Namespace, port: int) -> list[Reader]:
    """All streams at once, to their end.

    Looks at the sockets now and then: clients on other machines take no time from the server's core, nor
    does it have to wake them.
    """
    readers = [Reader(port, request_bytes(args)) for _ in range(args.streams)]
    waiting = readers
    while waiting:
        time.sleep(READ_INTERVAL_S)
        waiting = [reader for reader in waiting if not reader.read()]
    return readers


# ---- the report -------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with server(args) as (pid, port):
        warm = argparse.Namespace(**{**vars(args), "output_len": 50})
        stream_all(warm, port)
        sampler = None
        with tempfile.TemporaryDirectory() as folder:
            samples = Path(folder) / "samples"
            if args.profile:
                sampler = start_sampler(pid, samples)
            before, clock = cpu_seconds(pid), time.monotonic()
            readers = stream_all(args, port)
            after, clock = cpu_seconds(pid), time.monotonic() - clock
            if sampler is not None:
                sampler.send_signal(signal.SIGINT)  # it then writes its file
                sampler.wait(60)
                print_profile(samples)
    user, system = after[0] - before[0], after[1] - before[1]
    cpu = user + system
    tokens = sum(reader.tokens for reader in readers)
    # The role chunk of a chat and the last chunk with its counts are no token's.
    others = 2 if args.endpoint == "chat" else 1
    chunks = sum(reader.events - others for reader in readers)
    return {
        "endpoint": args.endpoint,
        "streams": args.streams,
        "tokens": tokens,
        "chunks": chunks,
        "joined_tokens": tokens - chunks,
        "cpu_user_s": round(user, 2),
        "cpu_system_s": round(system, 2),
        "wall_s": round(clock, 2),
        "cpu_us_per_chunk": round(cpu / chunks * 1e6, 2),
        "chunks_per_cpu_s": round(chunks / max(cpu, 0.01)),  # the least that /proc counts
        "chunks_per_s": round(chunks / clock),
    }


def start_sampler(pid: int, path: Path) -> subprocess.Popen[bytes]:
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise SystemExit("--profile needs py-spy: pip install py-spy")
    command = [program, "record", "--pid", str(pid), "--format", "raw", "--output", str(path)]
    command += ["--rate", "500", "--nonblocking", "--duration", "3600"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.0)  # it reads the process's memory map first
    return process


def print_profile(path: Path, rows: int = 30) -> None:
    """Shares of the samples: in a function itself, and in it with everything that it calls."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rsplit(":", 1)[0] for frame in stack.split(";")]
        own[frames[-1]] += int(count)
        for frame in set(frames):
            whole[frame] += int(count)
    total = max(1, sum(own.values()))
    print(f"{'itself':>7} {'with callees':>13}  function ({total} samples)")
    for frame, count in own.most_common(rows):
        print(f"{count / total:7.1%} {whole[frame] / total:13.1%}  {frame}")


def main() -> int:
    if sys.argv[1:2] == ["engine"]:
        run_engine(int(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["server"]:
        run_server(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="gives the tokenizer; not loaded")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=2000, help="tokens of each stream")
    parser.add_argument(
        "--running", metavar="PID:PORT", help="measure this process of another server instead"
    )
    parser.add_argument("--steps-per-second", type=float, help="default: as fast as the server reads")
    parser.add_argument("--extra-body", default="{}", help="more request fields, as JSON")
    parser.add_argument("--profile", action="store_true", help="list where the time goes (needs py-spy)")
    parser.add_argument("server_arguments", nargs="*", help="further flags for the server, after --")
    args = parser.parse_args()
    report = measure(args)
    print(f"{report['chunks_per_cpu_s']:,} token chunks per CPU second of the API process")
    joined = report["joined_tokens"] / report["tokens"]
    print(f"{report['chunks_per_s']:,} per second, {joined:.1%} of tokens joined")
    print(json.dumps(report))
    return 0 if report["tokens"] == args.streams * args.output_len else 1


if __name__ == "__main__":
    sys.exit(main())
