"""The main program of the engine process: reads commands, steps the engine, sends one message per step.

Started by `SpawnedEngine`, which passes the file descriptor of one end of a socket pair. It ends when the
other end closes, so no engine outlives its server.
"""

from __future__ import annotations

import contextlib
import errno
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
from microvllm.runtime.errors import NO_MEMORY_REMEDY, ConfigError, MicroVLLMError
from microvllm.runtime.kv_events.publishing_core import event_source
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
    Sleep,
    SleepChanged,
    Start,
    StartProfile,
    Step,
    StopProfile,
    WakeUp,
)
from microvllm.runtime.process.heartbeat import Heartbeat, print_stacks_on_signal
from microvllm.runtime.process.spawn import STOP_SIGNALS
from microvllm.runtime.request import StepOutput
from microvllm.runtime.worker.profiler import Profiler, ProfilerStateError

if TYPE_CHECKING:
    from microvllm.adapters.decoder import DecoderModel
    from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner
    from microvllm.runtime.worker.parallel.messages import RankFailed
    from microvllm.runtime.worker.parallel.runner import ParallelRunner
    from microvllm.runtime.worker.sleep import SleepingCore

logger = logging.getLogger("microvllm.engine")

PROGRESS_INTERVAL_S = 0.1
FULL = (errno.ENOSPC, errno.EDQUOT)
# Triton keeps what it compiles in the home folder, or where this variable says.
NO_ROOM_REMEDY = "free space there, or name a folder elsewhere with TRITON_CACHE_DIR (kernels for a GPU)"


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
            engine = _load(start.config, channel)
        except ConfigError as error:
            channel.send_event(Failed(str(error), error.remedy))
            return
        except (MemoryError, RuntimeError, OSError) as error:
            if (failed := failure(error)) is None:
                raise
            channel.send_event(failed)
            return
        if engine.core is not None:  # as it always is here
            stats, length = engine.core.stats(), engine.core.config.max_model_len
            channel.send_event(Ready(stats, length, event_source(engine.core)))
        heartbeat.begin()
        _run_engine(engine, channel, heartbeat)


def failure(error: Exception) -> Failed | None:
    """Return why the model could not be loaded, of what a machine may lack; None for any other `OSError`."""
    remedy = NO_MEMORY_REMEDY  # torch reports what it cannot allocate as a RuntimeError
    if isinstance(error, OSError):
        if error.errno not in FULL:
            return None
        remedy = NO_ROOM_REMEDY
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return Failed(f"the model could not be loaded: {reason}", remedy)


def _load(config: EngineConfig, channel: EngineEnd) -> SleepingCore:
    from microvllm.runtime.worker.parallel.runner import start_runner
    from microvllm.runtime.worker.sleep import SleepingCore

    sent, loaded = 0.0, False

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal sent
        if done in (0, total) or time.monotonic() - sent > PROGRESS_INTERVAL_S:
            sent = time.monotonic()
            channel.send_event(Progress(what, done, total, note))

    def on_failure(failure: RankFailed) -> None:
        # The main thread may wait for the rank that is gone, and nothing ends that.
        if not loaded:
            channel.send_event(Failed(failure.message, failure.remedy))
        else:
            logger.error("%s: the engine ends", failure.message)
        os._exit(1)

    def start(config: EngineConfig, model: DecoderModel | None) -> ModelGraphRunner | ParallelRunner:
        return start_runner(config, None if loaded else progress, on_failure, model)

    engine = SleepingCore(config, start)
    loaded = True
    return engine


def _run_engine(engine: SleepingCore, channel: EngineEnd, heartbeat: Heartbeat) -> None:
    freeze_objects()
    gc.enable()
    profiler = Profiler()
    try:
        while True:
            if engine.core is None:
                _wait_asleep(engine, channel, heartbeat)
            else:
                level = _serve(engine.core, channel, heartbeat, profiler)
                engine.sleep(level)
                channel.send_event(SleepChanged())
    finally:
        if engine.core is not None and engine.core.report is not None:
            engine.core.report.write_last()


def _wait_asleep(engine: SleepingCore, channel: EngineEnd, heartbeat: Heartbeat) -> None:
    heartbeat.resting = True
    commands = channel.receive_commands(wait=True)
    heartbeat.resting = False
    for command in commands:
        if isinstance(command, WakeUp):
            channel.send_event(_wake_up(engine, command))
        elif isinstance(command, Sleep):
            engine.sleep(command.level)
            channel.send_event(SleepChanged())
        elif isinstance(command, StartProfile | StopProfile):
            channel.send_event(Profiled(problem="The engine is asleep.", refused=True))


def _wake_up(engine: SleepingCore, command: WakeUp) -> SleepChanged:
    try:
        engine.wake_up(command.tags)
    except MicroVLLMError as error:
        return SleepChanged(str(error))
    except Exception as error:  # no memory: there may be some later
        logger.exception("Waking up failed.")
        return SleepChanged(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    return SleepChanged() if engine.core is None else _awake(engine.core)


def _awake(core: EngineCore[LaunchedStep]) -> SleepChanged:
    return SleepChanged(None, core.stats(), event_source(core))


def _serve(
    core: EngineCore[LaunchedStep], channel: EngineEnd, heartbeat: Heartbeat, profiler: Profiler
) -> int:
    """Step the core until it is at rest after a `Sleep` command; returns the level."""
    level = 0
    while not level or core.has_work():
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
            elif isinstance(command, Sleep):
                level = command.level
            elif isinstance(command, WakeUp):
                if level:  # it comes before the engine was at rest: there is nothing to wake
                    channel.send_event(SleepChanged())
                    level = 0
                    core.reset_prefix_cache()
                channel.send_event(_awake(core))
            else:
                outputs += _handle(core, command)
        worked = core.has_work()
        with profiler.step():
            outputs += core.step()
        # A step without outputs (a chunk of a prefill) is sent too: it shows that the step loop moves.
        channel.send_event(Step(outputs, core.stats()))
        if worked and not core.has_work():
            core.kv.check()
            if core.config.device == "cpu":
                return_freed_memory()  # the activations of long prompts
    return level


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
