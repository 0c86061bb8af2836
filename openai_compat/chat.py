"""POST /v1/chat/completions: a conversation in, the next message out, whole or streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.body import read_object
from microvllm.openai_compat.chat_chunks import ChatChunks
from microvllm.openai_compat.fields import parse_fields
from microvllm.openai_compat.generation import Generation, begin, priority_of, usage
from microvllm.openai_compat.sampling import sampling_params
from microvllm.openai_compat.schemas import CHAT
from microvllm.openai_compat.sse import EventStream, StreamOptions, event_chunks
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.chat_template import normalize_messages
from microvllm.runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from microvllm.runtime.client import EngineClient


async def create_chat_completion(request: Request) -> Response:
    state: ServerState = request.app.state.server
    fields = parse_fields(CHAT, await read_object(request, state))
    generation = begin(request, fields, state, "chatcmpl")
    # The newer name wins where both are given, as in vLLM.
    wish = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    params = sampling_params(fields, state.client, max_tokens=fields[wish], max_tokens_field=wish)
    priority = priority_of(request, fields)
    ids, last = await state.client.run_blocking(render, state.client, fields)
    await generation.submit(state, [ids], params, fields, priority)
    role, echo = _role_and_echo(fields, last, state.args.response_role)
    if fields["stream"]:
        options = StreamOptions.of(fields, state.args)
        writer = ChatChunks(
            generation,
            role=role,
            echo=echo,
            fingerprint=state.fingerprint,
            with_ids=fields["return_token_ids"],
            usage_follows=options.include_usage,
            continuous=options.continuous,
        )
        events = event_chunks(generation, writer, options, state.args.enable_prompt_tokens_details)
        return EventStream(generation, events, state.lifecycle)
    try:
        body = await state.lifecycle.run(_answer(generation, state, fields, role, echo), request.receive)
    finally:
        generation.abort()
    return Response(body, media_type="application/json")


def render(client: EngineClient, fields: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """The token ids of a conversation, and its last message, checked; runs in a worker thread.

    Raises `InvalidRequestError` naming `messages` for malformed ones, or the template's own complaint.
    """
    continued = fields["continue_final_message"]
    if continued and fields["add_generation_prompt"]:
        raise InvalidRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    opens_turn = not continued if fields["add_generation_prompt"] is None else fields["add_generation_prompt"]
    messages = normalize_messages(fields["messages"])
    ids = client.processor.render_chat(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continued,
        add_special_tokens=bool(fields["add_special_tokens"]),
        **fields["chat_template_kwargs"],
    )
    return ids, messages[-1]


def _role_and_echo(fields: Mapping[str, Any], last: dict[str, Any], response_role: str) -> tuple[str, str]:
    """The role of the answer, and the text of the last message where `echo` asks for it.

    Without a generation prompt, or when the last message is continued, the answer speaks as its author.
    """
    continues = fields["continue_final_message"] or fields["add_generation_prompt"] is False
    role = last["role"] if continues else response_role
    return role, last["content"] if fields["echo"] and last["role"] == role else ""


async def _answer(
    generation: Generation, state: ServerState, fields: Mapping[str, Any], role: str, echo: str
) -> bytes:
    """The JSON body of a whole answer; members and their order are vLLM's, nulls included."""
    with_ids = fields["return_token_ids"]
    outcomes = await generation.collect()
    choices = [
        {
            "index": index,
            "message": {
                "role": role,
                "content": echo + outcome.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": None,
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
            "prompt_logprobs": None,
            "prompt_token_ids": generation.streams[0].prompt_token_ids if with_ids else None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )
