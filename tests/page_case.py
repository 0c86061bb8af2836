"""Engines and servers that play recorded answers to the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from fake_client import EOS, FakeClient
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.text.detokenizer import TextDelta

CHAT = "/v1/chat/completions"


class ScriptedClient(FakeClient):
    """A fake engine that answers with texts of its own in turn, a few characters a token; the last again."""

    def __init__(self, *answers: str, max_model_len: int = 4096) -> None:
        super().__init__(max_model_len=max_model_len)
        self.answers = list(answers)
        self.processor.template = None

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        limit = request.params.max_tokens
        deltas = [TextDelta([97], piece) for piece in pieces[:limit]]
        if limit is not None and limit <= len(pieces):
            deltas[-1].finish_reason = "length"
        else:
            deltas.append(TextDelta([EOS], "", "stop"))
        return deltas

    @property
    def prompts(self) -> list[str]:
        """The rendered conversations that were submitted."""
        return [self.tokenizer.decode(ids) for ids, *_ in self.submitted]


class Played:
    """Answers chats with the events of recorded `deltas`, and passes everything else on."""

    def __init__(self, app: ASGIApp, deltas: Sequence[dict[str, Any]], delay: float = 0.0) -> None:
        self.app = app
        self.deltas = deltas
        self.delay = delay
        self.bodies: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CHAT:
            await self.app(scope, receive, send)
            return
        self.bodies.append(orjson.loads(await Request(scope, receive).body()))
        events = (b"data: %s\n\n" % orjson.dumps(event) for event in self._events())
        await StreamingResponse(self._stream(events), media_type="text/event-stream")(scope, receive, send)

    async def _stream(self, events: Any) -> Any:
        for event in events:
            await asyncio.sleep(self.delay)
            yield event
        yield b"data: [DONE]\n\n"

    def _events(self) -> Any:
        for number, delta in enumerate(self.deltas):
            usage = {"prompt_tokens": 9, "completion_tokens": number + 1, "total_tokens": number + 10}
            yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": usage}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None}
