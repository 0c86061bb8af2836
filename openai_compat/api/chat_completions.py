"""Serves POST /v1/chat/completions: writes the next message of a conversation, whole or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat import Chat
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import ObjectChunks
from microvllm.openai_compat.api.logprobs import ChatLogprobs, TokenText, as_token_ids, prompt_logprobs
from microvllm.openai_compat.api.requests import ChatCompletionRequest
from microvllm.openai_compat.api.streams import Outcome
from microvllm.openai_compat.api.usage import stream_usage
from microvllm.openai_compat.parsers.events import Content, Event, Reasoning, ToolCall
from microvllm.openai_compat.state import ServerState

if TYPE_CHECKING:
    from microvllm.runtime.text.detokenizer import TextDelta

_PLAIN_END = b'},"logprobs":null,"finish_reason":null,"token_ids":null}],"kv_transfer_params":null}\n\n'


async def create_chat_completion(
    request: Request, state: ServerState, body: ChatCompletionRequest
) -> Response:
    """Answers a conversation, whole or as a stream of events."""
    return await ChatCompletion(request, state, body).respond()


class ChatCompletion(Chat):
    """A chat whose choices are written as OpenAI's chat completions."""

    id_prefix = "chatcmpl"

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        """Return the body; its members and their order are vLLM's, nulls included."""
        logprobs = self.logprobs()
        with_ids = self.body.return_token_ids
        choices = [
            {
                "index": index,
                "message": self._message(index, outcome),
                "logprobs": logprobs[index].format_tokens(outcome.token_ids, outcome.logprobs)
                if logprobs
                else None,
                "finish_reason": self.parsed[index].finish_reason(outcome.finish_reason),
                "stop_reason": outcome.stop_reason,
                "token_ids": outcome.token_ids if with_ids else None,
                "routed_experts": None,
                "weight_versions": None,
            }
            for index, outcome in enumerate(outcomes)
        ]
        first = self.streams[0]
        return orjson.dumps(
            {
                "id": self.id,
                "object": "chat.completion",
                "created": self.created,
                "model": self.model,
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": self.state.fingerprint,
                "usage": usage,
                "prompt_logprobs": prompt_logprobs(self.state.client.tokenizer, first),
                "prompt_token_ids": first.prompt_token_ids if with_ids else None,
                "prompt_text": self.prompt_text,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": metrics,
            }
        )

    def _message(self, index: int, outcome: Outcome) -> dict[str, Any]:
        message = self.messages[index]
        text = outcome.text if self.parsing.is_plain else message.content
        calls = [_call(call.id, call.name, call.arguments) for call in message.tool_calls]
        return {
            "role": self.role,
            "content": self.echo + text if text is not None else self.echo or None,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            **({"tool_calls": calls} if calls else {}),
            "reasoning": message.reasoning,
        }

    def chunks(self) -> ChatChunks:
        return ChatChunks(self)

    def logprobs(self) -> list[ChatLogprobs]:
        """Return the writers of log probabilities, one per choice; none if they were not requested."""
        body = self.body
        if not body.logprobs:
            return []
        as_ids = as_token_ids(body, self.state.args)
        count = -1 if body.logprob_token_ids else body.top_logprobs
        tokenizer = self.state.client.tokenizer
        return [ChatLogprobs(TokenText(tokenizer, as_ids), count) for _ in range(self.params.n)]


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


class ChatChunks(ObjectChunks):
    """Writes a role chunk per choice with the first token, then one per delta; the last says why it ended.

    Of a choice that is parsed a delta may have no chunk, or several: one for texts, one for each call.
    """

    def __init__(self, chat: ChatCompletion) -> None:
        super().__init__(chat, "chat.completion.chunk")
        self._role = orjson.dumps(chat.role)
        self._echo = chat.echo
        self._logprobs = chat.logprobs()
        self._prompt_text = orjson.dumps(chat.prompt_text)
        self._choices = chat.choices()
        self._parsed = not chat.parsing.is_plain
        self._plain = not (self._with_ids or self._logprobs or self._parsed)
        self._continuous = chat.continuous_usage

    def opening(self) -> list[bytes]:
        prompt_ids = self._streams[0].prompt_token_ids
        usage = b',"usage":' + stream_usage(len(prompt_ids), 0) if self._continuous else b""
        choices = range(len(self._streams))
        events = [
            b'%s%d,"delta":{"role":%s,"content":""},"logprobs":null,"finish_reason":null}]%s'
            b',"prompt_token_ids":%s,"prompt_text":%s}\n\n'
            % (
                self._head,
                index,
                self._role,
                usage,
                orjson.dumps(prompt_ids if self._with_ids else None),
                self._prompt_text,
            )
            for index in choices
        ]
        if self._echo:
            events += [
                b'%s%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]%s}\n\n'
                % (self._head, index, orjson.dumps(self._echo), usage)
                for index in choices
            ]
        return events

    @property
    def stateless(self) -> bool:
        return self._plain

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        if self._plain and delta.finish_reason is None and not usage:
            return b'%s%d,"delta":{"content":%s%s' % (self._head, index, orjson.dumps(delta.text), _PLAIN_END)
        reason = delta.finish_reason
        if not self._parsed:
            return self._chunk(index, b'{"content":%s}' % orjson.dumps(delta.text), delta, reason, usage)
        choice = self._choices[index]
        messages = [orjson.dumps(message) for message in _messages(choice.feed(delta))]
        if not messages:
            if reason is None and not self._logprobs and not self._with_ids:
                return b""
            messages = [b"{}"]
        # All tokens of the delta are in the last chunk.
        first = [b'%s%d,"delta":%s%s' % (self._head, index, text, _PLAIN_END[1:]) for text in messages[:-1]]
        last = self._chunk(index, messages[-1], delta, choice.finish_reason(reason), usage)
        return b"".join(first) + last

    def _chunk(self, index: int, message: bytes, delta: TextDelta, reason: str | None, usage: bytes) -> bytes:
        logprobs = None
        if self._logprobs:
            logprobs = self._logprobs[index].format_tokens(delta.token_ids, delta.logprobs or [])
        token_ids = orjson.dumps(delta.token_ids if self._with_ids else None)
        if reason is None:
            end = b'null,"token_ids":%s}]%s' % (token_ids, usage)
        else:
            end = b'%s,"stop_reason":%s,"token_ids":%s,"weight_versions":null}]%s%s' % (
                orjson.dumps(reason),
                orjson.dumps(delta.stop_reason),
                token_ids,
                usage,
                self._last,
            )
        return b'%s%d,"delta":%s,"logprobs":%s,"finish_reason":%s,"kv_transfer_params":null}\n\n' % (
            self._head,
            index,
            message,
            orjson.dumps(logprobs),
            end,
        )


def _messages(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the `delta` objects of the events: the texts in one, each call in one of its own.

    Clients add up the pieces of a call by its index, but read only one piece of it from each chunk.
    """
    texts: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, (Content, Reasoning)):
            member = "content" if isinstance(event, Content) else "reasoning"
            texts[member] = texts.get(member, "") + event.text
        elif isinstance(event, ToolCall):
            calls[event.index] = {"index": event.index, **_call(event.id, event.name, "")}
        else:
            call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
    return [*([texts] if texts else []), *({"tool_calls": [call]} for call in calls.values())]


ENDPOINTS = (
    Endpoint(
        path="/v1/chat/completions",
        methods=("POST",),
        handler=create_chat_completion,
        body=ChatCompletionRequest,
        answer="ChatCompletionResponse",
        event="ChatCompletionStreamResponse",
        generates=True,
    ),
)
