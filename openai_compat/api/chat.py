"""POST /v1/chat/completions: a conversation in, the next message out, whole or streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat_chunks import ChatChunks
from microvllm.openai_compat.api.endpoint import Body, Endpoint
from microvllm.openai_compat.api.generation import Generation, Outcome, begin, priority_of
from microvllm.openai_compat.api.logprobs import ChatLogprobs, TokenText, as_token_ids, prompt_logprobs
from microvllm.openai_compat.api.prompts import Truncation, tokenize_text
from microvllm.openai_compat.api.sampling import check_prompt_logprobs, sampling_params
from microvllm.openai_compat.api.schemas import CHAT
from microvllm.openai_compat.api.sse import EventStream, StreamOptions, event_chunks
from microvllm.openai_compat.api.usage import usage
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.text.chat_template import content_text, normalize_messages

CHAT_BODY = Body("ChatCompletionRequest", CHAT)


@dataclass(frozen=True)
class Conversation:
    """A conversation made ready: its text and token ids, and how the answer begins."""

    text: str
    token_ids: list[int]
    role: str
    echo: str


async def create_chat_completion(request: Request, state: ServerState, fields: Mapping[str, Any]) -> Response:
    """Answers a conversation, whole or as a stream of events."""
    generation = begin(request, fields, state, "chatcmpl")
    params = chat_params(fields, state)
    priority = priority_of(request, fields)
    conversation = await state.client.run_rendering(render, state, fields)
    await generation.submit(state, [conversation.token_ids], params, fields, priority)
    logprobs = _logprob_writers(fields, state, params.n)
    if fields["stream"]:
        options = StreamOptions.of(fields, state.args)
        writer = ChatChunks(
            generation,
            role=conversation.role,
            echo=conversation.echo,
            fingerprint=state.fingerprint,
            logprobs=logprobs,
            with_ids=fields["return_token_ids"],
            prompt_text=conversation.text if fields["return_prompt_text"] else None,
            usage_follows=options.include_usage,
            continuous=options.continuous,
        )
        return EventStream(generation, event_chunks(generation, writer, options), state.lifecycle)
    answer = _answer(generation, state, fields, conversation, logprobs)
    try:
        body = await state.lifecycle.run(answer, request.receive)
    finally:
        generation.abort()
    return Response(body, media_type="application/json")


def chat_params(fields: Mapping[str, Any], state: ServerState) -> SamplingParams:
    """The sampling parameters of a chat. Raises `InvalidRequestError` naming the field."""
    check_prompt_logprobs(fields)
    # The newer name wins where both are given, as in vLLM.
    name = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    return sampling_params(
        fields,
        state.client,
        max_tokens=fields[name],
        max_tokens_field=name,
        logprobs=_alternatives(fields, state),
        prompt_logprobs=fields["prompt_logprobs"],
    )


def render(state: ServerState, fields: Mapping[str, Any]) -> Conversation:
    """A conversation through the chat template, checked; runs in a worker thread.

    Raises `InvalidRequestError` naming `messages` for malformed ones, or the template's own complaint.
    """
    client = state.client
    continued = fields["continue_final_message"]
    if continued and fields["add_generation_prompt"]:
        raise InvalidRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    opens_turn = not continued if fields["add_generation_prompt"] is None else fields["add_generation_prompt"]
    messages = normalize_messages(fields["messages"])
    text = client.processor.render_text(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continued,
        chat_template_content_format=state.args.chat_template_content_format,
        **_template_variables(fields, state),
    )
    truncation = Truncation.of(fields, client.config.max_model_len)
    ids = tokenize_text(client, text, bool(fields["add_special_tokens"]), truncation)
    last = messages[-1]
    # Without a generation prompt, or when the last message is continued, the answer speaks as its author.
    speaks_on = continued or fields["add_generation_prompt"] is False
    role = last["role"] if speaks_on else state.args.response_role
    echoed = fields.get("echo") and last["role"] == role
    return Conversation(text, ids, role, content_text(last["content"]) if echoed else "")


def _template_variables(fields: Mapping[str, Any], state: ServerState) -> dict[str, Any]:
    """The server's defaults under the request's own; an effort turns thinking on or off unless told."""
    kwargs = fields["chat_template_kwargs"]
    variables = {**state.args.default_chat_template_kwargs, **kwargs}
    effort = fields.get("reasoning_effort")
    if effort is not None:
        effort = state.args.reasoning_effort_map.get(effort, effort)
        variables["reasoning_effort"] = effort
        if "enable_thinking" not in kwargs:
            variables["enable_thinking"] = effort != "none"
    # Tools are only taken where none may be called.
    if fields["tools"] is not None and not state.args.exclude_tools_when_tool_choice_none:
        variables["tools"] = fields["tools"]
    return variables


def _alternatives(fields: Mapping[str, Any], state: ServerState) -> int | None:
    """How many log probabilities beside each token's own; None without `logprobs`."""
    count: int = fields["top_logprobs"]
    if count < -1:
        raise InvalidRequestError(f"top_logprobs must be at least -1, got {count}.", "top_logprobs")
    if not fields["logprobs"]:
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


def _logprob_writers(fields: Mapping[str, Any], state: ServerState, n: int) -> list[ChatLogprobs]:
    if not fields["logprobs"]:
        return []
    as_ids = as_token_ids(fields, state.args)
    count = -1 if fields["logprob_token_ids"] else fields["top_logprobs"]
    return [ChatLogprobs(TokenText(state.client.tokenizer, as_ids), count) for _ in range(n)]


async def _answer(
    generation: Generation,
    state: ServerState,
    fields: Mapping[str, Any],
    conversation: Conversation,
    logprobs: Sequence[ChatLogprobs],
) -> bytes:
    outcomes = await generation.collect()
    if not logprobs and fields["prompt_logprobs"] is None:
        return _body(generation, state, fields, conversation, logprobs, outcomes)
    # Log probabilities can be a hundred times as much text as the answer.
    return await state.client.run_blocking(_body, generation, state, fields, conversation, logprobs, outcomes)


def _body(
    generation: Generation,
    state: ServerState,
    fields: Mapping[str, Any],
    conversation: Conversation,
    logprobs: Sequence[ChatLogprobs],
    outcomes: Sequence[Outcome],
) -> bytes:
    """The JSON body of a whole answer; members and their order are vLLM's, nulls included."""
    with_ids = fields["return_token_ids"]
    choices = [
        {
            "index": index,
            "message": {
                "role": conversation.role,
                "content": conversation.echo + outcome.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": logprobs[index].take(outcome.token_ids, outcome.logprobs) if logprobs else None,
            "finish_reason": outcome.finish_reason,
            "stop_reason": outcome.stop_reason,
            "token_ids": outcome.token_ids if with_ids else None,
            "routed_experts": None,
            "weight_versions": None,
        }
        for index, outcome in enumerate(outcomes)
    ]
    completion_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    cached = generation.cached_tokens if state.args.enable_prompt_tokens_details else None
    first = generation.streams[0]
    return orjson.dumps(
        {
            "id": generation.id,
            "object": "chat.completion",
            "created": generation.created,
            "model": generation.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": state.fingerprint,
            "usage": usage(generation.prompt_tokens, completion_tokens, cached),
            "prompt_logprobs": None
            if first.prompt_logprobs is None
            else prompt_logprobs(state.client.tokenizer, first.prompt_token_ids, first.prompt_logprobs),
            "prompt_token_ids": first.prompt_token_ids if with_ids else None,
            "prompt_text": conversation.text if fields["return_prompt_text"] else None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": generation.metrics(completion_tokens)
            if state.args.enable_per_request_metrics
            else None,
        }
    )


ENDPOINTS = (
    Endpoint(
        path="/v1/chat/completions",
        methods=("POST",),
        handler=create_chat_completion,
        body=CHAT_BODY,
        answer="ChatCompletionResponse",
        event="ChatCompletionStreamResponse",
        generates=True,
    ),
)
