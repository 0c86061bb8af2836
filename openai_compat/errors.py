"""Writes error bodies: `{"error": {"message", "type", "param", "code"}}`, as JSON or as an event of a stream.

vLLM spells `type` in two ways: "Bad Request" for a body of the wrong shape (with `param` "body.<field>"),
"BadRequestError" for a value that is out of range. So do we. Below /v1/messages every error has the form of
Anthropic's API: `{"type": "error", "error": {"type", "message"}}`.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from microvllm.runtime.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    RequestError,
)

BAD_SHAPE = "Bad Request"
HTTP_KINDS = {404: "NotFoundError", 405: "MethodNotAllowedError"}
INTERNAL = "Internal server error."
ANTHROPIC_PATH = "/v1/messages"
# The types of Anthropic's errors by status; its clients retry by the status.
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
MAX_QUOTED = 200  # characters of a client's text that an error repeats
RETRY_AFTER_S = 1


class PayloadTooLargeError(RequestError):
    """The body of a request exceeds the limit of its size."""

    status = 413
    kind = "PayloadTooLargeError"


class ContentEncodingError(RequestError):
    """The body of a request is compressed."""

    status = 415
    kind = "UnsupportedMediaTypeError"


class RequestTimeoutError(RequestError):
    """The body of a request did not arrive in time."""

    status = 408
    kind = "RequestTimeoutError"


class BodyMemoryError(EngineBusyError):
    """The unfinished bodies of all requests together take too much memory."""

    def __init__(self) -> None:
        super().__init__("The server is receiving too many large request bodies at once.")


class UnauthorizedError(RequestError):
    """The request has none of the server's keys."""

    status = 401
    kind = "AuthenticationError"


class ForbiddenError(RequestError):
    """The server refuses the request for the host it names."""

    status = 403
    kind = "PermissionDeniedError"


class ServerStoppingError(EngineDeadError):
    """The server drains (new requests) or its drain deadline has passed (running ones)."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""


class Fault(Exception):
    """One field has the wrong shape; `place` is a member of it, such as "function.name"."""

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.place = place


def clip(text: str) -> str:
    """Return at most `MAX_QUOTED` characters of what a client sent."""
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


def shape_error(faults: list[tuple[str, Fault]]) -> InvalidRequestError:
    """Return the 400 for fields of the wrong shape, with a sentence for each of the first ten.

    `faults` pairs a location such as "body.seed" with its fault. The client's own value is never repeated:
    printing a deeply nested one is an attack in itself.
    """
    sentences = []
    for place, fault in faults[:10]:
        field = place.removeprefix("body.")
        where = place if field.isdigit() else field
        if fault.place:
            where += fault.place if fault.place.startswith("[") else f": {fault.place}"
        sentences.append(f"{where}: {fault.problem}.")
    return InvalidRequestError(" ".join(sentences), faults[0][0], kind=BAD_SHAPE)


def error_object(error: RequestError | EngineError, path: str = "") -> dict[str, Any]:
    """Return the error body of vLLM's surface for a deliberate error, in the form of the path's API."""
    if is_anthropic(path):
        return anthropic_error(error)
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": getattr(error, "param", None),
            "code": error.status,
        }
    }


def is_anthropic(path: str) -> bool:
    """Return whether a path belongs to Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def anthropic_error(error: RequestError | EngineError) -> dict[str, Any]:
    """Return the error body of Anthropic's API.

    Its clients recognise a prompt that is too long by these words, and then shorten the conversation.
    """
    message = f"prompt is too long: {error}" if isinstance(error, ContextLengthError) else str(error)
    kind = ANTHROPIC_KINDS.get(error.status, "invalid_request_error")
    found: dict[str, Any] = {"type": kind, "message": message}
    if getattr(error, "param", None) == "thread":
        # The SDK's tool runner then sends the whole conversation with each turn.
        found["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": found}


def error_event(error: RequestError | EngineError) -> bytes:
    """Return the error as one server-sent event, for a stream whose 200 is already on its way."""
    return b"data: " + orjson.dumps(error_object(error)) + b"\n\n"


def error_response(error: RequestError | EngineError, path: str = "") -> Response:
    """Return the response of an error in the format of OpenAI's API, or of the API of `path`."""
    headers = {}
    if error.status == 503:
        headers["retry-after"] = str(max(RETRY_AFTER_S, math.ceil(getattr(error, "retry_after_s", 0))))
    if isinstance(error, (BodyMemoryError, PayloadTooLargeError, RequestTimeoutError)):
        # The rest of the body is never read, so the connection cannot carry another request.
        headers["connection"] = "close"
    if isinstance(error, ContentEncodingError):
        headers["accept-encoding"] = "identity"  # RFC 9110, 15.5.16
    return Response(orjson.dumps(error_object(error, path)), error.status, headers, "application/json")


def unauthorized(path: str) -> Response:
    """Return the 401 of a request without a key; vLLM's has no error object."""
    headers = {"www-authenticate": "Bearer"}
    body = b'{"error":"Unauthorized"}'
    if is_anthropic(path):
        problem = "The key is missing or wrong: send it as x-api-key or as Authorization: Bearer."
        body = orjson.dumps(anthropic_error(UnauthorizedError(problem)))
    return Response(body, 401, headers, "application/json")


def answer_to(error: Exception, scope: Scope) -> Response | None:
    """Return the answer to what a request raised; None for a bug of ours."""
    if isinstance(error, (RequestError, EngineError)):
        return error_response(error, scope["path"])
    if isinstance(error, HTTPException):
        return _no_endpoint(error, scope)
    if isinstance(error, ClientGoneError):
        return Response(status_code=499)  # what proxies log for a client that has left
    return None


def internal_error(path: str) -> Response:
    """Return the answer to a bug of ours, without its traceback, which the server logs."""
    return error_response(EngineError(INTERNAL), path)


# What clients ask for whose base URL lacks /v1.
OF_V1 = ("/chat/completions", "/completions", "/responses", "/messages", "/models", "/embeddings")


def _no_endpoint(error: HTTPException, scope: Scope) -> Response:
    """Return the answer to an unknown path or method."""
    path = clip(scope["path"])
    message = f"{error.detail}: this server has no endpoint {path}."
    if path.startswith("/v1/v1/"):
        message += " The client adds /v1 to a base URL that has it already."
    elif path in OF_V1:
        message += f" It is at /v1{path}: the base URL of the client should end in /v1."
    if error.status_code == 405:
        # Starlette keeps the methods in a set, whose order differs from start to start.
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = f"{error.detail}: {path} takes {allowed}, not {scope['method']}."
    refusal = RequestError(message, kind=HTTP_KINDS.get(error.status_code, BAD_SHAPE))
    refusal.status = error.status_code
    headers = dict(error.headers or {})
    answer = error_object(refusal, scope["path"])
    return Response(orjson.dumps(answer), error.status_code, headers, "application/json")
