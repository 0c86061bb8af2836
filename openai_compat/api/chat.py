"""Serves POST /v1/chat/completions: renders a conversation and writes the next message, whole or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Generation, ObjectChunks
from microvllm.openai_compat.api.logprobs import ChatLogprobs, TokenText, as_token_ids, prompt_logprobs
from microvllm.openai_compat.api.prompts import Truncation, tokenize_text
from microvllm.openai_compat.api.requests import ChatCompletionRequest, TokenizeRequest
from microvllm.openai_compat.api.sampling import sampling_params
from microvllm.openai_compat.api.streams import Outcome
from microvllm.openai_compat.api.usage import stream_usage
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.text.chat_template import content_text, normalize_messages

if TYPE_CHECKING:
    from microvllm.runtime.text.detokenizer import TextDelta

_PLAIN_END = b'},"logprobs":null,"finish_reason":null,"token_ids":null}],"kv_transfer_params":null}\n\n'


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its text and token ids, and how the response begins."""

    text: str
    token_ids: list[int]
    role: str
    echo: str


async def create_chat_completion(
    request: Request, state: ServerState, body: ChatCompletionRequest
) -> Response:
    """Answers a conversation, whole or as a stream of events."""
    return await Chat(request, state, body).respond()


class Chat(Generation[ChatCompletionRequest]):
    """A request with a conversation, and its choices.

    `role` is the author of the choices, `echo` the text that they begin with, `prompt_text` the rendered
    conversation if the response is to show it.
    """

    id_prefix = "chatcmpl"
    role: str
    echo: str
    prompt_text: str | None

    def sampling_params(self) -> SamplingParams:
        body = self.body
        # The newer name wins where both are given, as in vLLM.
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return sampling_params(
            body,
            self.state.client,
            max_tokens=getattr(body, name),
            max_tokens_field=name,
            logprobs=_alternatives(body, self.state),
            prompt_logprobs=body.prompt_logprobs,
        )

    async def read_prompts(self) -> list[list[int]]:
        client = self.state.client
        conversation = await client.run_rendering(render, self.state, self.body)
        client.processor.check_prompt(conversation.token_ids)
        self.role, self.echo = conversation.role, conversation.echo
        self.prompt_text = conversation.text if self.body.return_prompt_text else None
        return [conversation.token_ids]

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        """Return the body; its members and their order are vLLM's, nulls included."""
        logprobs = self.logprobs()
        with_ids = self.body.return_token_ids
        choices = [
            {
                "index": index,
                "message": {
                    "role": self.role,
                    "content": self.echo + outcome.text,
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": logprobs[index].format_tokens(outcome.token_ids, outcome.logprobs)
                if logprobs
                else None,
                "finish_reason": outcome.finish_reason,
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


class ChatChunks(ObjectChunks):
    """Writes a role chunk per choice with the first token, then one per delta; the last says why it ended."""

    def __init__(self, chat: Chat) -> None:
        super().__init__(chat, "chat.completion.chunk")
        self._role = orjson.dumps(chat.role)
        self._echo = chat.echo
        self._logprobs = chat.logprobs()
        self._prompt_text = orjson.dumps(chat.prompt_text)
        self._plain = not self._with_ids and not self._logprobs
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

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        text = orjson.dumps(delta.text)
        if self._plain and delta.finish_reason is None and not usage:
            return b'%s%d,"delta":{"content":%s%s' % (self._head, index, text, _PLAIN_END)
        logprobs = None
        if self._logprobs:
            logprobs = self._logprobs[index].format_tokens(delta.token_ids, delta.logprobs or [])
        token_ids = orjson.dumps(delta.token_ids if self._with_ids else None)
        if delta.finish_reason is None:
            end = b'null,"token_ids":%s}]%s' % (token_ids, usage)
        else:
            end = b'%s,"stop_reason":%s,"token_ids":%s,"weight_versions":null}]%s%s' % (
                orjson.dumps(delta.finish_reason),
                orjson.dumps(delta.stop_reason),
                token_ids,
                usage,
                self._last,
            )
        return (
            b'%s%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":%s,"kv_transfer_params":null}\n\n'
        ) % (self._head, index, text, orjson.dumps(logprobs), end)


def render(state: ServerState, body: ChatCompletionRequest | TokenizeRequest) -> Conversation:
    """Render a conversation through the chat template and tokenise it; runs in a worker thread.

    Raises `InvalidRequestError` naming `messages` for malformed ones, or the template's own complaint.
    """
    client = state.client
    continued = body.continue_final_message
    if continued and body.add_generation_prompt:
        raise InvalidRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    opens_turn = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    messages = normalize_messages(body.messages)
    text = client.processor.render_text(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continued,
        chat_template_content_format=state.args.chat_template_content_format,
        **_template_variables(body, state),
    )
    truncation = Truncation.of(body, client.config.max_model_len)
    ids = tokenize_text(client, text, bool(body.add_special_tokens), truncation)
    last = messages[-1]
    # Without a generation prompt, or when the last message is continued, its author is the response's.
    speaks_on = continued or body.add_generation_prompt is False
    role = last["role"] if speaks_on else state.args.response_role
    echoed = body.echo and last["role"] == role
    return Conversation(text, ids, role, content_text(last["content"]) if echoed else "")


def _template_variables(body: ChatCompletionRequest | TokenizeRequest, state: ServerState) -> dict[str, Any]:
    """Return the server's variables, overridden by the request's.

    A reasoning effort turns thinking on or off, unless the request has `enable_thinking`.
    """
    kwargs = body.chat_template_kwargs
    variables: dict[str, Any] = {**state.args.default_chat_template_kwargs}
    variables.update(kwargs.items())
    effort: str | None = body.reasoning_effort
    if effort is not None:
        effort = state.args.reasoning_effort_map.get(effort, effort)
        variables["reasoning_effort"] = effort
        if "enable_thinking" not in kwargs:
            variables["enable_thinking"] = effort != "none"
    # Tools are only accepted with `tool_choice: "none"`, to be shown to the model.
    if body.tools is not None and not state.args.exclude_tools_when_tool_choice_none:
        variables["tools"] = msgspec.to_builtins(body.tools)
    return variables


def _alternatives(body: ChatCompletionRequest, state: ServerState) -> int | None:
    """Return how many log probabilities to report beside each token's own; None without `logprobs`."""
    count: int = body.top_logprobs
    if count < -1:
        raise InvalidRequestError(f"top_logprobs must be at least -1, got {count}.", "top_logprobs")
    if not body.logprobs:
        if count:
            raise InvalidRequestError(
                "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs"
            )
        return None
    limit = state.client.config.max_logprobs
    if limit != -1 and (count if count >= 0 else state.client.config.spec.vocab_size) > limit:
        raise InvalidRequestError(
            f"Requested sample logprobs of {count}, which is greater than max allowed: {limit}",
            "top_logprobs",
        )
    return count


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
