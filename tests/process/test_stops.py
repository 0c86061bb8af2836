"""A real `microvllm serve` that is interrupted, loses its outputs, or cannot start its engine again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_tools import health_of, held_port
from model_tools import variant_folder
from process_tools import PATIENCE_S, alive, engines_of, wait_until

from microvllm.runtime.process import spawn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
# A server of which only the first engine process loads, and which does not wait between its attempts.
FRAGILE = """
import sys
from microvllm import cli
from microvllm.runtime.process import replica
replica.RESTART_DELAYS_S = (0, 0, 0)
start, starts = replica.EngineProcess.start, []
async def fail_later(config, *rest):
    starts.append(1)
    if len(starts) > 1:
        raise replica.EngineError("no memory")
    return await start(config, *rest)
replica.EngineProcess.start = fail_later
cli.main()
"""


@contextlib.contextmanager
def serve(*command: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server process that may still load, in a session of its own, and its port."""
    held = held_port()
    port = held.getsockname()[1]
    words = command or ("-m", "microvllm")
    flags = ["serve", "--model", str(variant_folder("llama-tied")), "--port", str(port), "--cpu-threads", "1"]
    process = subprocess.Popen(
        [sys.executable, *words, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        **{"stdin": subprocess.DEVNULL, "start_new_session": True, **options},
    )  # fmt: skip
    try:
        yield process, port
    finally:
        engines = engines_of(process.pid)
        process.kill()
        process.communicate()
        held.close()
        wait_until(lambda: not any(map(alive, engines)), "the engine has ended")


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


@pytest.mark.parametrize("delay_s", [0, 0.1, 0.3])
def test_ctrl_c_in_the_first_moments_prints_no_traceback(delay_s: float) -> None:
    with serve(**PIPES) as (process, _):
        wait_until(lambda: handles(process.pid, signal.SIGINT), "Python has started")
        wait_until(lambda: not handles(process.pid, signal.SIGINT), "the program has")
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (-signal.SIGINT, 130)
        assert b"Traceback" not in output and b"KeyboardInterrupt" not in output, output.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_signal_to_the_terminal_as_the_engine_starts_ends_everything(number: signal.Signals) -> None:
    with serve(**PIPES) as (process, _):
        wait_until(lambda: bool(engines_of(process.pid)), "there is an engine process")
        engines = engines_of(process.pid)
        wait_until(lambda: handles(process.pid, number), "there is a handler")
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (128 + number, 130)
        assert b"Traceback" not in output, output.decode()
        wait_until(lambda: not any(map(alive, engines)), "the engine has ended")


def test_a_server_under_nohup_ignores_a_hangup_and_drains_at_sigquit() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with serve(preexec_fn=ignore, **PIPES) as (process, port):
        wait_until(lambda: health_of(port) == 200, "the server answers")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert health_of(port) == 200
        process.send_signal(signal.SIGQUIT)
        assert process.wait(PATIENCE_S) == 0


def test_a_killed_server_takes_its_loading_engine_along() -> None:
    with serve(**PIPES) as (process, _):
        wait_until(lambda: bool(engines_of(process.pid)), "there is an engine process")
        (engine,) = engines_of(process.pid)
        wait_until(lambda: len(os.listdir(f"/proc/{engine}/task")) > 1, "its heartbeat's thread runs")
        process.kill()
        process.wait()
        wait_until(lambda: not alive(engine), "the engine has ended")


@pytest.mark.parametrize("broken", ["full", "closed", "reader gone"])
def test_outputs_that_cannot_be_written_stop_no_start(broken: str) -> None:
    """Nor the drain behind a signal to end."""

    def close() -> None:
        os.closerange(0, 3)

    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as full:
        outputs: dict[str, Any] = {
            "full": {"stdout": full, "stderr": full},
            "closed": {"stdin": None, "preexec_fn": close},
            "reader gone": {"stdout": writer, "stderr": writer},
        }[broken]
        with serve(**outputs) as (process, port):
            os.close(writer)
            wait_until(lambda: process.poll() is not None or health_of(port) == 200, "the server answers")
            assert process.poll() is None
            body = {"prompt": "hi", "max_tokens": 3}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=PATIENCE_S)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM if broken == "full" else signal.SIGHUP)
            assert process.wait(PATIENCE_S) == 0


def test_an_engine_that_cannot_load_again_ends_the_server() -> None:
    with serve("-c", FRAGILE, **PIPES) as (process, port):
        wait_until(lambda: health_of(port) == 200, "the server answers")
        (engine,) = engines_of(process.pid)
        os.kill(engine, signal.SIGKILL)
        output = process.communicate(timeout=PATIENCE_S)[0].decode()
        assert process.returncode == 1
        assert output.count("could not be started again: no memory") == 3, output
        last = [line for line in output.splitlines() if "error: " in line][-1]
        assert last == "microvllm: error: the engine could not be started again in 3 attempts: no memory"
        assert "Traceback" not in output, output


def test_the_signals_that_stop_a_service() -> None:
    assert set(spawn.STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
