"""Engines and servers that play recorded answers to the chat page, and a user of it in a browser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
from browser import Page
from fake_client import FakeClient
from http_tools import real_server
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

CHAT = "/v1/chat/completions"
IDLE = "document.getElementById('send').getAttribute('aria-label') === 'Send'"
BUSY = "document.getElementById('send').getAttribute('aria-label') === 'Stop'"


class ScriptedClient(FakeClient):
    """A fake engine that answers with texts in turn, a byte a token."""

    def __init__(self, *answers: str, max_model_len: int = 8192) -> None:
        super().__init__(max_model_len=max_model_len)
        self.recorded = list(answers)

    @property
    def prompts(self) -> list[str]:
        """The rendered conversations that were submitted."""
        return [self.tokenizer.decode(ids) for ids, *_ in self.submitted]


class Played:
    """Answers chats with the events of recorded deltas, and passes everything else on."""

    def __init__(self, app: ASGIApp, deltas: Sequence[dict[str, Any]]) -> None:
        self.app = app
        choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
        events = [b"data: %s\n\n" % orjson.dumps({"choices": [choice]}) for choice in choices]
        self._body = b"".join([*events, b"data: [DONE]\n\n"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        chat = scope["type"] == "http" and scope["path"] == CHAT
        app = Response(self._body, media_type="text/event-stream") if chat else self.app
        await app(scope, receive, send)


@contextmanager
def opened(
    page: Page,
    client: ScriptedClient,
    *,
    width: int = 1000,
    dark: bool = False,
    prefix: str = "",
    **args: Any,
) -> Iterator[Page]:
    """The page of a server with this engine. Nothing may go wrong in it."""
    with real_server(client, **args) as port:
        page.open(f"http://127.0.0.1:{port}{prefix}/", width, dark=dark)
        page.wait("document.getElementById('load').textContent !== ''")
        yield page
        assert not page.problems


def ask(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def answered(page: Page, number: int = 1) -> str:
    """The text of the last answer, once there are so many and it is complete."""
    page.wait(f"document.querySelectorAll('.assistant').length === {number} && {IDLE}")
    return page.text(".assistant .body")
