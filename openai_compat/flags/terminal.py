"""Asks a running server from the terminal: `microvllm chat` and `microvllm complete`.

Answers go to stdout and everything else to stderr, so that a pipe holds answers only. On a terminal each
line typed is a turn, Ctrl-C ends the answer that is being written and Ctrl-D the session; from a pipe each
line of stdin is a turn, and the first failure ends the command.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from microvllm.openai_compat.flags.argv import UsageError
from microvllm.runtime.errors import MicroVLLMError

NO_SERVER_REMEDY = "start a server with `microvllm serve`, or name another with --url or OPENAI_BASE_URL"
URL_REMEDY = "does the address end in /v1? Name it with --url or OPENAI_BASE_URL"
REQUEST_REMEDY = "the answer of the server says what to change; --help lists what this command sends"
SERVER_LOG_REMEDY = "the log of the server may say why"
LIST_TIMEOUT_S = 30.0  # for the list of models, which takes no computation


class RemoteError(MicroVLLMError):
    """The server is not there, refuses, or fails; the message is one line."""


@dataclass(frozen=True)
class Remote:
    """A server and the model to ask there. `stats` prints the speed after each answer."""

    client: openai.OpenAI
    url: str
    model: str
    stats: bool

    @classmethod
    def connect(cls, url: str, api_key: str | None, model: str | None, stats: bool) -> Remote:
        """Connect to a server; without `model` its first one is taken.

        Raises `UsageError` for arguments that cannot be sent, `RemoteError` if the server does not answer.
        """
        _check_url(url)
        for flag, text in (("--api-key", api_key), ("--model-name", model)):
            _check_text(flag, text)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("--api-key must be printable ASCII, as it travels in a header")
        # The openai package requires a key; a server without keys ignores it.
        client = openai.OpenAI(base_url=url, api_key=api_key or "EMPTY", max_retries=0)
        if model is None:
            with _one_line_errors(url):
                # Whatever answers at this address: it need not be a list of models.
                page: Any = client.with_options(timeout=LIST_TIMEOUT_S).models.list()
            try:
                names = [str(card.id) for card in page.data]
            except (AttributeError, TypeError) as error:
                raise RemoteError(f"{url} lists no models as OpenAI does", remedy=URL_REMEDY) from error
            if not names:
                raise RemoteError(f"{url} has no model", remedy="name one with --model-name")
            model = names[0]
        return cls(client, url, model, stats)

    def show_answer(
        self, create: Callable[..., Any], text_of: Callable[[Any], str | None], **request: Any
    ) -> tuple[str, bool]:
        """Ask, print the answer as it arrives, and return its text and whether it is complete.

        `create` is the openai client's function, `text_of` the text in one choice of its chunks. Only
        Ctrl-C on a terminal cuts an answer short. Raises `RemoteError`.
        """
        if self.stats:
            request["stream_options"] = {"include_usage": True}
        start = time.perf_counter()
        first: float | None = None
        tokens = 0
        text = ""
        whole = False
        with contextlib.closing(self._chunks(create, request)) as chunks:
            try:
                for chunk in chunks:
                    if chunk.usage is not None:
                        tokens = chunk.usage.completion_tokens
                    piece = text_of(chunk.choices[0]) if chunk.choices else None
                    if piece:
                        first = first or time.perf_counter()
                        text += piece
                        print(piece, end="", flush=True)
                whole = True
            except KeyboardInterrupt:
                if not _on_terminal():
                    raise
            finally:
                if whole or text:  # also above an error's line
                    print(flush=True)
        if self.stats and whole and first is not None:
            seconds = time.perf_counter() - start
            _note(f"TTFT: {1000 * (first - start):.2f} ms")
            _note(f"TPS:  {tokens / seconds:.2f} tokens/s ({tokens} tokens in {seconds:.2f}s)")
        return text, whole

    def _chunks(self, create: Callable[..., Any], request: dict[str, Any]) -> Generator[Any, None, None]:
        """Yield the chunks of one answer; closing this generator closes the connection."""
        with _one_line_errors(self.url), create(model=self.model, stream=True, **request) as stream:
            yield from stream


Limits = Mapping[str, float | None]  # request fields; what is None is left to the server


def chat(
    remote: Remote, limits: Limits, *, system_prompt: str | None = None, quick: str | None = None
) -> None:
    """Hold a conversation; with `quick` only its first turn."""
    fields = {name: value for name, value in limits.items() if value is not None}
    _check_text("--system-prompt", system_prompt)
    messages: list[dict[str, str]] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    for text in _turns(remote, "Type a message; Ctrl-D ends the chat.", quick):
        turn = [*messages, {"role": "user", "content": text}]
        with _reported():
            answer, _ = remote.show_answer(
                remote.client.chat.completions.create,
                lambda choice: choice.delta.content,
                messages=turn,
                **fields,
            )
            # Only what was answered is part of the conversation: a message that was refused, say as too
            # long, would have every later one refused, too.
            messages = [*turn, {"role": "assistant", "content": answer}]


def complete(remote: Remote, limits: Limits, *, quick: str | None = None) -> None:
    """Continue one text after the other; with `quick` only that one."""
    fields = {name: value for name, value in limits.items() if value is not None}
    for text in _turns(remote, "Type a text to go on from; Ctrl-D ends.", quick):
        with _reported():
            remote.show_answer(
                remote.client.completions.create, lambda choice: choice.text, prompt=text, **fields
            )


def _turns(remote: Remote, hint: str, quick: str | None) -> Iterator[str]:
    """Yield the user's messages, a turn each; empty lines are skipped."""
    # Neither an odd byte in the input nor a terminal without Unicode may end the session.
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if quick is not None:
        _check_text("--quick", quick)
        yield quick
        return
    if not _on_terminal():
        for line in sys.stdin or ():
            if text := line.rstrip("\r\n"):
                yield text
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives `input` its line editing and history
    _note(f"Using model: {remote.model} on {remote.url}")
    _note(hint)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text:
            yield text


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Print a failed turn as one line, on a terminal, so that the session continues."""
    try:
        yield
    except RemoteError as error:
        if not _on_terminal():
            raise
        _note(f"microvllm: error: {error}")


@contextlib.contextmanager
def _one_line_errors(url: str) -> Iterator[None]:
    """Turn whatever the openai client and the connection below it raise into `RemoteError`."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise RemoteError(f"{url} does not answer in time", remedy=NO_SERVER_REMEDY) from error
    except openai.APIConnectionError as error:
        raise _failed_connection(url, error.__cause__ or error) from error
    except openai.AuthenticationError as error:
        raise RemoteError(
            f"{url}: the API key is missing or wrong", remedy="give it with --api-key or OPENAI_API_KEY"
        ) from error
    except openai.APIStatusError as error:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        unusual = not urlsplit(url).path.rstrip("/").endswith("/v1")
        remedy = URL_REMEDY if error.status_code == 404 and unusual else REQUEST_REMEDY
        reason = _one_line(message or error.response.reason_phrase)
        raise RemoteError(f"{url}: status {error.status_code}: {reason}", remedy=remedy) from error
    except openai.OpenAIError as error:  # among them an error event in a stream
        raise RemoteError(f"{url}: {_one_line(error)}", remedy=SERVER_LOG_REMEDY) from error
    except Exception as error:
        # A connection that breaks in mid-answer may raise what the HTTP library below openai has for it, and
        # which library that is depends on the version of openai.
        raise _failed_connection(url, error) from error


def _failed_connection(url: str, error: BaseException) -> RemoteError:
    return RemoteError(f"the connection to {url} failed ({_one_line(error)})", remedy=NO_SERVER_REMEDY)


def _one_line(what: object) -> str:
    text = " ".join(str(what).split())
    return text or type(what).__name__


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        usable = False
    if not usable or not url.isprintable():
        raise UsageError(
            f"--url {url!r} is not an address of a server", remedy="it must be like http://localhost:8000/v1"
        )


def _check_text(flag: str, text: str | None) -> None:
    """Refuse lone surrogates: bytes of the command line that are not UTF-8, which JSON cannot carry."""
    try:
        (text or "").encode()
    except UnicodeError as error:
        raise UsageError(f"{flag} is not UTF-8 text") from error


def _on_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
