#!/usr/bin/env python3
"""Run the routers of others, unmodified, in front of two servers: chats, a stream, prefix hits: one table.

    python scripts/routers/check.py                      # all of them
    python scripts/routers/check.py smg vllm-router      # some

Each is installed from PyPI into an environment of its own below --folder (once). Two servers on the CPU
hold the same small model, each with a KV cache for half of the chats' prompts, and publish KV events. Every
request must succeed, a stream must come whole and in parts, both servers must get requests, and a policy that
looks at prefixes must find more of the prompts' tokens in the caches than turns do. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from routers import BLOCK_SIZE, ROUTERS, Replica, Router, Setup
from workload import Outcome, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environments import free_port, install

START_TIMEOUT_S, END_S = 180.0, 15.0
NUM_BLOCKS = 100
EVENTS = {
    "enable_kv_cache_events": True,
    "endpoint": "tcp://127.0.0.1:*",
    "replay_endpoint": "tcp://127.0.0.1:*",
}
SERVER = ("--cpu-threads", "1", "--max-model-len", "1024", "--num-gpu-blocks-override", str(NUM_BLOCKS))


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, url: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a program; enter once it answers at `url`. Raises `RuntimeError` with the end of its log."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}
        )
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def replicas(model: str, folder: Path, count: int = 2) -> Iterator[list[Replica]]:
    """Fresh servers with empty caches."""
    with contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(count)]
        for port in ports:
            command = [
                sys.executable,
                "-m",
                "microvllm",
                "serve",
                "--model",
                model,
                "--port",
                str(port),
                *SERVER,
            ]
            command += ["--block-size", str(BLOCK_SIZE), "--kv-events-config", json.dumps(EVENTS)]
            log, url = folder / f"server-{port}.log", f"http://127.0.0.1:{port}/health"
            stack.enter_context(running(command, log, url, {"OMP_NUM_THREADS": "1"}))
        found = []
        for port in ports:
            url = f"http://127.0.0.1:{port}"
            with urllib.request.urlopen(f"{url}/kv_event_sources", timeout=5) as answer:
                source = json.load(answer)["0"]
            found.append(Replica(url, source["endpoint"], source["replay_endpoint"]))
        yield found


def try_policy(router: Router, policy: str, programs: Path, folder: Path, model: str) -> Outcome:
    """Send the chats through a router in front of fresh servers."""
    with replicas(model, folder) as servers:
        setup = Setup(programs, folder, free_port(), free_port(), servers, model)
        url = f"http://127.0.0.1:{setup.port}"
        command, environment = router.command(setup, policy), dict(router.environment or {})
        with running(command, folder / f"router-{policy}.log", f"{url}/v1/models", environment):
            wait_routed(url, model)
            return run(url, model, setup.urls)


def wait_routed(url: str, model: str) -> None:
    """Wait until the router knows the servers."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"{url}/v1/models", timeout=5) as a,
        ):
            if any(card["id"] == model for card in json.load(a)["data"]):
                return
        if time.monotonic() > end:
            raise RuntimeError("the router does not find the servers")
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROUTERS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "microvllm-routers")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--logs", type=Path, help="where the logs of routers and servers are kept")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ROUTERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    failed = 0
    print(
        "| router | version | policy | requests | events of a stream | prefix hits | shares | seconds |",
        flush=True,
    )
    print("|---|---|---|---:|---:|---:|---|---:|", flush=True)
    for name in args.names or ROUTERS:
        router, blind = ROUTERS[name], None
        for policy in router.policies:
            start = time.monotonic()
            try:
                programs, version = install(name, router.packages, npm=False, folder=args.folder.resolve())
                with contextlib.ExitStack() as stack:
                    logs = args.logs / name / policy if args.logs else None
                    folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    folder.mkdir(parents=True, exist_ok=True)
                    start = time.monotonic()
                    found = try_policy(router, policy, programs, folder, args.model)
                shares = " ".join(f"{share:.0%}" for share in found.shares)
                row = f"{found.requests} | {found.events} | {found.hit_rate:.1%} | {shares}"
                print(
                    f"| {name} | {version} | {policy} | {row} | {time.monotonic() - start:.0f} |", flush=True
                )
                if not all(found.shares):
                    raise RuntimeError("one server got no request")
                if blind is not None and found.hit_rate <= blind:
                    raise RuntimeError(f"{policy} finds no more than turns do")
                blind = found.hit_rate if blind is None else blind
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                print(f"| {name} | | {policy} | FAILED | | | | |", flush=True)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
