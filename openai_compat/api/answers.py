"""Defines the JSON schemas of responses, for the OpenAPI document. Tests hold real responses to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRING = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
INTEGER = {"type": "integer"}
IDS_OR_NULL = {"type": ["array", "null"], "items": INTEGER}
OBJECT_OR_NULL = {"type": ["object", "null"]}

# What may go wrong with a request that has a body.
FAILURES: Mapping[str, str] = {
    "400": "A field has the wrong shape, is out of range or is not supported; the error names it.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "500": "The engine failed.",
    "503": "The engine is busy, is being started again, or the server is stopping; try again.",
}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that always has all of these members, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_USAGE = _object(
    prompt_tokens=INTEGER,
    total_tokens=INTEGER,
    completion_tokens=INTEGER,
    prompt_tokens_details=OBJECT_OR_NULL,
    completion_tokens_details=OBJECT_OR_NULL,
)
_REASONS = ["stop", "length", "abort", "repetition"]
_STOP_REASON = {"type": ["string", "integer", "null"]}
_CALL = {"name": STRING, "arguments": STRING}
_TOOL_CALL = _object(id=STRING, type={"const": "function"}, function=_object(**_CALL))
_MESSAGE = _object(role=STRING, content=TEXT_OR_NULL, reasoning=TEXT_OR_NULL)
# A piece of a call has its index; the first one of a call also has id, type and name.
_CALL_PIECE = {
    "type": "object",
    "properties": {
        "index": INTEGER,
        "id": STRING,
        "type": {"const": "function"},
        "function": {"type": "object", "properties": _CALL},
    },
    "required": ["index"],
}
_DELTA = {"role": STRING, "content": STRING, "reasoning": STRING, "tool_calls": _list(_CALL_PIECE)}
_ENDED = {"finish_reason": {"enum": _REASONS}, "stop_reason": _STOP_REASON, "token_ids": IDS_OR_NULL}
_CHOICE = {"index": INTEGER, "logprobs": OBJECT_OR_NULL, **_ENDED}
_ANSWER = {
    "id": STRING,
    "created": INTEGER,
    "model": STRING,
    "system_fingerprint": TEXT_OR_NULL,
    "usage": _reference("UsageInfo"),
    "metrics": OBJECT_OR_NULL,
}
# The data of one event. Members that not every chunk has are not required: `usage`, what ends a choice.
_CHUNK = {"id": STRING, "created": INTEGER, "model": STRING}
_CHUNK_CHOICE = {
    "index": INTEGER,
    "logprobs": OBJECT_OR_NULL,
    "finish_reason": {"enum": [*_REASONS, None]},
}
_SOMETIMES = {
    "usage": {"type": "object", "required": ["prompt_tokens", "total_tokens", "completion_tokens"]},
    "system_fingerprint": STRING,
    "metrics": {"type": "object"},
}


def _chunk(choice: Mapping[str, Any], **members: Any) -> dict[str, Any]:
    schema = _object(**_CHUNK, **members, choices=_list(choice))
    return {**schema, "properties": {**schema["properties"], **_SOMETIMES}}


# Anthropic's API. A block's first members say what it is; the others follow from its type.
_BLOCK = _object(type={"enum": ["text", "thinking", "tool_use"]})
_BLOCK_DELTA = _object(type={"enum": ["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]})
_MESSAGE_END = {
    "stop_reason": {
        "enum": [
            *("end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"),
            None,
        ]
    },
    "stop_sequence": TEXT_OR_NULL,
}
_MESSAGE_USAGE = _object(
    input_tokens=INTEGER,
    cache_creation_input_tokens=INTEGER,
    cache_read_input_tokens=INTEGER,
    output_tokens=INTEGER,
)
_ANTHROPIC_MESSAGE = _object(
    id=STRING,
    type={"const": "message"},
    role={"const": "assistant"},
    model=STRING,
    content=_list(_BLOCK),
    usage=_MESSAGE_USAGE,
    **_MESSAGE_END,
)
_ANTHROPIC_ERROR = _object(type={"const": "error"}, error=_object(type=STRING, message=STRING))
_MESSAGE_EVENTS = (
    _object(type={"const": "message_start"}, message=_ANTHROPIC_MESSAGE),
    _object(type={"const": "content_block_start"}, index=INTEGER, content_block=_BLOCK),
    _object(type={"const": "content_block_delta"}, index=INTEGER, delta=_BLOCK_DELTA),
    _object(type={"const": "content_block_stop"}, index=INTEGER),
    _object(type={"const": "message_delta"}, delta=_object(**_MESSAGE_END), usage=_MESSAGE_USAGE),
    _object(type={"enum": ["message_stop", "ping"]}),
    _ANTHROPIC_ERROR,
)

# Names are vLLM's, as far as it has them.
SCHEMAS: Mapping[str, Any] = {
    "UsageInfo": _USAGE,
    "CompletionResponse": _object(
        object={"const": "text_completion"},
        choices=_list(_object(text=STRING, prompt_token_ids=IDS_OR_NULL, **_CHOICE)),
        **_ANSWER,
    ),
    "CompletionStreamResponse": _chunk(
        _object(text=STRING, **{**_CHUNK_CHOICE, "stop_reason": _STOP_REASON, "token_ids": IDS_OR_NULL}),
        object={"const": "text_completion"},
    ),
    "ChatCompletionResponse": _object(
        object={"const": "chat.completion"},
        choices=_list(
            _object(
                message={
                    **_MESSAGE,
                    "properties": {**_MESSAGE["properties"], "tool_calls": _list(_TOOL_CALL)},
                },
                **{**_CHOICE, "finish_reason": {"enum": [*_REASONS, "tool_calls"]}},
            )
        ),
        prompt_token_ids=IDS_OR_NULL,
        **_ANSWER,
    ),
    "ChatCompletionStreamResponse": _chunk(
        _object(
            delta={"type": "object", "properties": _DELTA},
            **{**_CHUNK_CHOICE, "finish_reason": {"enum": [*_REASONS, "tool_calls", None]}},
        ),
        object={"const": "chat.completion.chunk"},
    ),
    "ResponsesResponse": _object(
        id=STRING,
        object={"const": "response"},
        created_at=INTEGER,
        status={"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
        model=STRING,
        output=_list(_object(id=STRING, type=STRING)),
        error=OBJECT_OR_NULL,
        incomplete_details=OBJECT_OR_NULL,
        usage=OBJECT_OR_NULL,
    ),
    "ResponsesStreamEvent": _object(type=STRING, sequence_number=INTEGER),
    "InputTokens": _object(object={"const": "response.input_tokens"}, input_tokens=INTEGER),
    "DeletedResponse": _object(id=STRING, object={"const": "response"}, deleted={"const": True}),
    "ResponseItemList": _object(
        object={"const": "list"},
        data=_list(_object(id=STRING, type=STRING)),
        first_id=TEXT_OR_NULL,
        last_id=TEXT_OR_NULL,
        has_more={"type": "boolean"},
    ),
    "Generation": _object(
        id=STRING, text=STRING, usage=_reference("UsageInfo"), metrics=OBJECT_OR_NULL, **_ENDED
    ),
    "GenerationChunk": _object(
        id=STRING, text=STRING, **{**_ENDED, "finish_reason": {"enum": [*_REASONS, None]}}
    ),
    "Message": _ANTHROPIC_MESSAGE,
    "MessageStreamEvent": {"oneOf": list(_MESSAGE_EVENTS)},
    "MessageTokensCount": _object(input_tokens=INTEGER),
    "AnthropicErrorResponse": _ANTHROPIC_ERROR,
    "GenerateRequest": _object(
        request_id=STRING,
        token_ids=_list(INTEGER),
        sampling_params={"type": "object"},
        model=TEXT_OR_NULL,
        stream={"type": "boolean"},
        priority=INTEGER,
    ),
    "GenerateRequests": _list(_reference("GenerateRequest")),
    "EmbeddingResponse": _object(
        id=STRING,
        object={"const": "list"},
        created=INTEGER,
        model=STRING,
        data=_list(
            _object(
                index=INTEGER,
                object={"const": "embedding"},
                embedding={"anyOf": [{"type": "array", "items": {"type": "number"}}, STRING]},
            )
        ),
        usage=_reference("UsageInfo"),
    ),
    "ScoreResponse": _object(
        id=STRING,
        object={"const": "list"},
        created=INTEGER,
        model=STRING,
        data=_list(_object(index=INTEGER, object={"const": "score"}, score={"type": "number"})),
        usage=_reference("UsageInfo"),
    ),
    "RerankResponse": _object(
        id=STRING,
        model=STRING,
        usage=_object(prompt_tokens=INTEGER, total_tokens=INTEGER),
        results=_list(
            _object(index=INTEGER, document=_object(text=STRING), relevance_score={"type": "number"})
        ),
    ),
    "ModelList": _object(object={"const": "list"}, data=_list(_reference("ModelCard"))),
    "ModelCard": _object(
        id=STRING,
        object={"const": "model"},
        created=INTEGER,
        owned_by=STRING,
        root=STRING,
        parent=TEXT_OR_NULL,
        max_model_len=INTEGER,
        permission=_list({"type": "object"}),
    ),
    "TokenizeResponse": _object(
        count=INTEGER,
        max_model_len=INTEGER,
        tokens=_list(INTEGER),
        token_strs={"type": ["array", "null"], "items": TEXT_OR_NULL},
    ),
    "DetokenizeResponse": _object(prompt=STRING),
    "Version": _object(version=STRING),
    "Load": _object(server_load=INTEGER),
    "Success": _object(success={"type": "boolean"}),
    "Sleep": _object(is_sleeping={"type": "boolean"}),
    "EngineLoad": _object(load=INTEGER),
    "Loads": _object(
        timestamp=STRING,
        version=STRING,
        dp_rank_count=INTEGER,
        loads=_list(_object(dp_rank=INTEGER, num_running_reqs=INTEGER, num_waiting_reqs=INTEGER)),
        aggregate=_object(total_running_reqs=INTEGER, total_waiting_reqs=INTEGER, total_reqs=INTEGER),
    ),
    "KVEventSources": {
        "type": "object",
        "additionalProperties": _object(endpoint=STRING, replay_endpoint=TEXT_OR_NULL, topic=STRING),
    },
    "ServerInfo": _object(
        version=STRING, served_model_name=STRING, context_length=INTEGER, max_running_requests=INTEGER
    ),
    "TokenizerInfoResponse": _object(tokenizer_class=STRING),
    "ErrorResponse": _object(error=_object(message=STRING, type=STRING, param=TEXT_OR_NULL, code=INTEGER)),
}
