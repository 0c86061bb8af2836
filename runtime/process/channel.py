"""The messages between the API process and the engine process: msgpack over a unix socket pair.

Every frame is 4 bytes of length (little endian) and one encoded message. No pickle, no TCP port; the
pair has no name, so no other process can connect, and the death of either side is an end of file.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import EngineRequest, StepOutput
from microvllm.runtime.worker.profiler import ProfilerConfig

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """First command: load this model."""

    config: EngineConfig


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """One prompt of an `Add`, and the ids of its samples."""

    token_ids: list[int]
    max_tokens: int | None
    request_ids: list[int]


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """All sequences of a request: what they share travels once, and each prompt once for its samples."""

    shared: EngineRequest  # without a prompt
    prompts: list[Prompt]

    @classmethod
    def of(cls, shared: EngineRequest, prompts: Sequence[Sequence[EngineRequest]]) -> Add:
        """Return the message for the samples of each prompt, which were made of `shared`."""
        return cls(
            shared,
            [
                Prompt(
                    samples[0].prompt_token_ids,
                    samples[0].params.max_tokens,
                    [sample.request_id for sample in samples],
                )
                for samples in prompts
            ],
        )

    def samples(self) -> Iterator[list[EngineRequest]]:
        """Yield the samples of each prompt; they share every list."""
        for prompt in self.prompts:
            params = self.shared.params
            if prompt.max_tokens is not None:
                params = params.with_max_tokens(prompt.max_tokens)
            yield [
                msgspec.structs.replace(
                    self.shared,
                    request_id=request_id,
                    prompt_token_ids=prompt.token_ids,
                    params=params,
                    sample=sample,
                )
                for sample, request_id in enumerate(prompt.request_ids)
            ]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """A command: end these requests."""

    request_ids: list[int]


class ResetPrefixCache(msgspec.Struct, frozen=True, array_like=True, tag="reset"):
    """A command: forget the cached prefixes."""


class Sleep(msgspec.Struct, frozen=True, array_like=True, tag="sleep"):
    """A command: give memory back once all requests have ended, at vLLM's level 1 or 2."""

    level: int


class WakeUp(msgspec.Struct, frozen=True, array_like=True, tag="wake_up"):
    """A command: take the memory of these tags again."""

    tags: list[str]


class SleepChanged(msgspec.Struct, frozen=True, array_like=True, tag="sleep_changed"):
    """The answer to each of the two commands before it.

    `problem`: why nothing has changed, in one line. `stats` and `kv_events` are those of `Ready`, when the
    engine is awake again; its counters begin at zero.
    """

    problem: str | None = None
    stats: EngineStats | None = None
    kv_events: KVEventsConfig | None = None


class StartProfile(msgspec.Struct, frozen=True, array_like=True, tag="start_profile"):
    """A command: start a profile; `prefix` begins the name of its file."""

    config: ProfilerConfig
    prefix: str


class StopProfile(msgspec.Struct, frozen=True, array_like=True, tag="stop_profile"):
    """A command: stop the profile and write its file."""


class Profiled(msgspec.Struct, frozen=True, array_like=True, tag="profiled"):
    """The answer to each of the two commands before it: the file, or a problem in one line.

    `refused`: the command did not fit (a second start, a stop without one).
    """

    file: str = ""
    problem: str | None = None
    refused: bool = False


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """The start of the engine, see `microvllm.runtime.progress.OnProgress`."""

    what: str
    done: int
    total: int
    note: str = ""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine has started; `stats` holds its sizes. max_model_len: in tokens, perhaps lowered.

    kv_events: with the addresses where its events are published.
    """

    stats: EngineStats
    max_model_len: int
    kv_events: KVEventsConfig | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine could not start: the reason in one line, and the remedy in another if it is known."""

    message: str
    remedy: str | None = None


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One message per step, for all requests together."""

    outputs: list[StepOutput]
    stats: EngineStats


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Sent about each second once the model is loaded. `resting`: the step loop waits for requests."""

    resting: bool


Command = Start | Add | Abort | ResetPrefixCache | Sleep | WakeUp | StartProfile | StopProfile
Event = Progress | Ready | Failed | Step | SleepChanged | Profiled | Beat


def frame(encoder: msgspec.msgpack.Encoder, message: msgspec.Struct) -> bytes:
    """Encode one message with its length in front."""
    body = encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def frame_bytes(header: bytes | bytearray) -> int:
    """Return the length of a frame's message. Raises `EOFError` for one that no side sends."""
    size = int.from_bytes(header, "little")
    if size > MAX_FRAME_BYTES:
        raise EOFError(f"a frame of {size} bytes")
    return size


MessageT = TypeVar("MessageT")


class Link(Generic[MessageT]):
    """One end of a socket pair, blocking; `kind` is the type of the messages that arrive.

    Methods raise `OSError`, and those that read `EOFError`, when the other side is gone.
    """

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self.sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(kind)
        self._received = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    def encode(self, message: msgspec.Struct) -> bytes:
        return frame(self._encoder, message)

    def send(self, data: bytes) -> None:
        """Send what `encode` made."""
        self.sock.sendall(data)

    def receive(self, timeout_s: float | None = None) -> MessageT:
        """The next message. Raises `TimeoutError` if it has not begun to arrive."""
        while (message := self._next()) is None:
            # No timeout of the socket, which would be one of sending as well.
            if timeout_s is not None and not self._readable(timeout_s):
                raise TimeoutError
            self._read()
        return message

    def _readable(self, timeout_s: float) -> bool:
        return bool(select.select([self.sock], [], [], timeout_s)[0])

    def _read(self) -> None:
        data = self.sock.recv(1 << 20)
        if not data:
            raise EOFError("the other side is gone")
        self._received += data

    def _next(self) -> MessageT | None:
        """The first of the messages that have arrived as a whole."""
        if len(self._received) < HEADER_BYTES:
            return None
        end = HEADER_BYTES + frame_bytes(self._received[:HEADER_BYTES])
        if len(self._received) < end:
            return None
        message = self._decoder.decode(self._received[HEADER_BYTES:end])
        del self._received[:end]
        return message


class EngineEnd(Link[Command]):
    """The engine's end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, Command)
        self._sending = threading.Lock()  # the heartbeat is sent by a thread of its own

    def send_event(self, event: Event) -> None:
        """Send one event; may be called by any thread."""
        with self._sending:
            self.send(self.encode(event))

    def receive_commands(self, *, wait: bool) -> list[Command]:
        """Return all commands that have arrived. Waits for one if there are none and `wait` is set."""
        commands: list[Command] = []
        while (wait and not commands) or self._readable(0):
            self._read()
            while (command := self._next()) is not None:
                commands.append(command)
        return commands
