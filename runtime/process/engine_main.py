"""The main program of the engine process: reads commands, steps the engine, sends one message per step.

Started by `SpawnedEngine`, which passes the file descriptor of one end of a socket pair. It ends when the
other end closes, so no engine outlives its server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.errors import NO_MEMORY_REMEDY, ConfigError
from microvllm.runtime.kv_events.publishing_core import event_source, make_core
from microvllm.runtime.machine import freeze_objects, return_freed_memory
from microvllm.runtime.process.channel import (
    Abort,
    Add,
    Command,
    EngineEnd,
    Failed,
    Profiled,
    Progress,
    Ready,
    ResetPrefixCache,
    Start,
    StartProfile,
    Step,
    StopProfile,
)
from microvllm.runtime.process.heartbeat import Heartbeat, print_stacks_on_signal
from microvllm.runtime.process.spawn import STOP_SIGNALS
from microvllm.runtime.request import StepOutput
from microvllm.runtime.worker.profiler import Profiler, ProfilerStateError

if TYPE_CHECKING:
    from microvllm.runtime.worker.model_runner import LaunchedStep
    from microvllm.runtime.worker.parallel.messages import RankFailed

logger = logging.getLogger("microvllm.engine")

PROGRESS_INTERVAL_S = 0.1


def main() -> None:
    """Run the engine process on the socket whose descriptor is the first argument."""
    # Ctrl-C and a stop of the whole service reach every process; the API process decides when this one
    # may go, so that running requests can be finished.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `SpawnedEngine` has blocked them
    print_stacks_on_signal()
    channel = EngineEnd(socket.socket(fileno=int(sys.argv[1])))
    heartbeat = Heartbeat(channel)
    gc.disable()  # until the model is loaded: nothing of what is imported is ever freed
    # Torch takes longest, so it is imported before `Start` arrives; the signals are set by then.
    importlib.import_module("microvllm.runtime.worker.model_runner")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        (start,) = channel.receive_commands(wait=True)
        if not isinstance(start, Start):
            raise TypeError(f"the first command must be Start, not {type(start).__name__}")
        if start.config.data_parallel_size > 1:
            logging.basicConfig(format=f"engine {start.config.data_parallel_rank}: %(message)s")
        try:
            core = _load(start.config, channel)
        except ConfigError as error:
            channel.send_event(Failed(str(error), error.remedy))
            return
        except (MemoryError, RuntimeError) as error:  # torch reports what it cannot allocate as the latter
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            channel.send_event(Failed(f"the model could not be loaded: {reason}", NO_MEMORY_REMEDY))
            return
        channel.send_event(Ready(core.stats(), core.config.max_model_len, event_source(core)))
        heartbeat.begin()
        _run_engine(core, channel, heartbeat)


def _load(config: EngineConfig, channel: EngineEnd) -> EngineCore[LaunchedStep]:
    from microvllm.runtime.worker.parallel.runner import start_runner

    sent, runner = 0.0, None

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal sent
        if done in (0, total) or time.monotonic() - sent > PROGRESS_INTERVAL_S:
            sent = time.monotonic()
            channel.send_event(Progress(what, done, total, note))

    def on_failure(failure: RankFailed) -> None:
        # The main thread may wait for the rank that is gone, and nothing ends that.
        if runner is None:
            channel.send_event(Failed(failure.message, failure.remedy))
        else:
            logger.error("%s: the engine ends", failure.message)
        os._exit(1)

    runner = start_runner(config, progress, on_failure)
    return make_core(runner.config, runner)


def _run_engine(core: EngineCore[LaunchedStep], channel: EngineEnd, heartbeat: Heartbeat) -> None:
    freeze_objects()
    gc.enable()
    try:
        _serve(core, channel, heartbeat)
    finally:
        if core.report is not None:
            core.report.write_last()


def _serve(core: EngineCore[LaunchedStep], channel: EngineEnd, heartbeat: Heartbeat) -> None:
    profiler = Profiler()
    while True:
        outputs: list[StepOutput] = []
        resting = not core.has_work()
        if core.report is not None:
            core.report.write_if_due(resting)
        core.clock.enter("idle" if resting else "messages")
        heartbeat.resting = resting
        commands = channel.receive_commands(wait=resting)
        heartbeat.resting = False
        core.clock.enter("messages")
        for command in commands:
            if isinstance(command, StartProfile | StopProfile):
                channel.send_event(_profile(profiler, command))
            else:
                outputs += _handle(core, command)
        worked = core.has_work()
        with profiler.step():
            outputs += core.step()
        # A step without outputs (a chunk of a prefill) is sent too: it shows that the step loop moves.
        channel.send_event(Step(outputs, core.stats()))
        if worked and not core.has_work():
            core.scheduler.check()
            if core.config.device == "cpu":
                return_freed_memory()  # the activations of long prompts


def _handle(core: EngineCore[LaunchedStep], command: Command) -> list[StepOutput]:
    """Execute a command; returns the outputs of requests that were refused."""
    if isinstance(command, Add):
        return [refusal for samples in command.samples() for refusal in core.add_samples(samples)]
    if isinstance(command, Abort):
        for request_id in command.request_ids:
            core.abort(request_id)
    elif isinstance(command, ResetPrefixCache):
        core.reset_prefix_cache()
    return []


def _profile(profiler: Profiler, command: StartProfile | StopProfile) -> Profiled:
    try:
        if isinstance(command, StartProfile):
            return Profiled(profiler.start(command.config, command.prefix))
        return Profiled(profiler.stop())
    except ProfilerStateError as error:
        return Profiled(problem=str(error), refused=True)
    except Exception as error:  # a full disk, a profiler without its library: requests go on
        logger.exception("Profiling failed.")
        return Profiled(problem=f"the profile failed ({type(error).__name__}: {error})")


if __name__ == "__main__":
    main()
