"""Every error microvllm raises on purpose.

MicroVLLMError
├── RequestError                 one request is wrong; carries an HTTP status, a parameter name
│   ├── InvalidRequestError      400  (also a ValueError, for users of the Python API)
│   ├── ContextLengthError       400  the prompt does not fit the context
│   ├── ModelNotFoundError       404
│   ├── EngineBusyError          503  the waiting queue is full
│   ├── QueueTimeoutError        503  it waited longer than --queue-timeout
│   └── RequestDeadlineError     504  it took longer than --request-timeout
├── ConfigError                  an option, a model folder or a file is wrong; the message is one line
└── EngineError                  the engine itself failed
    ├── EngineDeadError          503  the engine process is gone; it is being started again
    └── EngineAsleepError        503  the engine gave its memory back, until it is woken
"""

from __future__ import annotations

NO_MEMORY_REMEDY = "free memory, or take less of it with --max-model-len or --kv-cache-memory-bytes"


def reason_of(error: BaseException) -> str:
    """Return why an operation failed, on one line: the system's own words where it has some."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


class MicroVLLMError(Exception):
    """Base of all deliberate errors.

    `remedy` says in one line what to do about it, where the place that raises the error knows; the command
    line prints it below the message, Python (3.11 and later) below the traceback.
    """

    def __init__(self, message: str = "", *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy
        if remedy is not None and hasattr(self, "add_note"):
            self.add_note(remedy)


class RequestError(MicroVLLMError):
    """One request cannot be served; all others are unaffected.

    `param` names the request field at fault, `status` is the HTTP status and `kind` the `type` of the
    error body that vLLM's clients expect (vLLM 0.33, serve/engine/protocol.py).
    """

    status = 400
    kind = "BadRequestError"
    reason = "error"  # how such an end is counted

    def __init__(self, message: str, param: str | None = None, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if kind is not None:
            self.kind = kind


class InvalidRequestError(RequestError, ValueError):
    """A field is missing, of the wrong type or out of range."""


class ContextLengthError(InvalidRequestError):
    """The prompt (with at least one output token) is longer than the context or the KV pool."""


class ModelNotFoundError(RequestError):
    """A request names a model that the server does not have."""

    status = 404
    kind = "NotFoundError"


class EngineBusyError(RequestError):
    """The queue has no room now; `retry_after_s` is when it is predicted to have some."""

    status = 503
    kind = "Service Unavailable"

    def __init__(self, message: str, retry_after_s: float = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(RequestError):
    """The request waited longer than the server allows, and was not begun."""

    status = 503
    kind = "QueueTimeoutError"
    reason = "queue_timeout"

    def __init__(self) -> None:
        super().__init__("The request waited longer than the server's --queue-timeout.")


class RequestDeadlineError(RequestError):
    """The request took longer than the server allows, and was ended."""

    status = 504
    kind = "TimeoutError"
    reason = "request_timeout"

    def __init__(self) -> None:
        super().__init__("The request took longer than the server's --request-timeout.")


class ConfigError(MicroVLLMError):
    """A command-line option, a model folder or the machine does not allow what was asked."""


class EngineError(MicroVLLMError):
    """The engine failed; the request that sees it did nothing wrong."""

    status = 500
    kind = "InternalServerError"
    reason = "error"


class EngineDeadError(EngineError):
    """There is no engine process to compute the request: it has died, or the server is stopping."""

    status = 503
    kind = "ServiceUnavailableError"


class EngineAsleepError(EngineError):
    """The engine was put to sleep: it computes nothing until it is woken up."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self) -> None:
        super().__init__("The engine is asleep: POST /wake_up wakes it up.")
