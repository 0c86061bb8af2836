"""The JSON schemas of what the server answers, for its OpenAPI document. Tests hold real answers to them."""

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
    "500": "The engine failed.",
    "503": "The engine is busy, is being started again, or the server is stopping; try again.",
}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that always has all of these members, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_USAGE = _object(
    prompt_tokens=INTEGER,
    total_tokens=INTEGER,
    completion_tokens=INTEGER,
    prompt_tokens_details=OBJECT_OR_NULL,
    completion_tokens_details=OBJECT_OR_NULL,
)
_ENDED = {
    "finish_reason": {"enum": ["stop", "length", "abort", "repetition"]},
    "stop_reason": {"type": ["string", "integer", "null"]},
    "token_ids": IDS_OR_NULL,
}
_CHOICE = {"index": INTEGER, "logprobs": OBJECT_OR_NULL, **_ENDED}
_USAGE_OF = {"$ref": "#/components/schemas/Usage"}
_ANSWER = {
    "id": STRING,
    "created": INTEGER,
    "model": STRING,
    "system_fingerprint": TEXT_OR_NULL,
    "usage": _USAGE_OF,
    "metrics": OBJECT_OR_NULL,
}

SCHEMAS: Mapping[str, Any] = {
    "Usage": _USAGE,
    "Completion": _object(
        object={"const": "text_completion"},
        choices=_list(_object(text=STRING, prompt_token_ids=IDS_OR_NULL, **_CHOICE)),
        **_ANSWER,
    ),
    "ChatCompletion": _object(
        object={"const": "chat.completion"},
        choices=_list(_object(message=_object(role=STRING, content=TEXT_OR_NULL), **_CHOICE)),
        prompt_token_ids=IDS_OR_NULL,
        **_ANSWER,
    ),
    "Generation": _object(id=STRING, text=STRING, usage=_USAGE_OF, metrics=OBJECT_OR_NULL, **_ENDED),
    "ModelList": _object(object={"const": "list"}, data=_list({"$ref": "#/components/schemas/ModelCard"})),
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
    "Tokens": _object(
        count=INTEGER,
        max_model_len=INTEGER,
        tokens=_list(INTEGER),
        token_strs={"type": ["array", "null"], "items": TEXT_OR_NULL},
    ),
    "Text": _object(prompt=STRING),
    "Version": _object(version=STRING),
    "Load": _object(server_load=INTEGER),
    "Success": _object(success={"type": "boolean"}),
    "Sleep": _object(is_sleeping={"type": "boolean"}),
    "ServerInfo": _object(
        vllm_config={"type": ["string", "object"]}, vllm_env={"type": "object"}, system_env={"type": "object"}
    ),
    "TokenizerInfo": _object(tokenizer_class=STRING),
    "Error": _object(error=_object(message=STRING, type=STRING, param=TEXT_OR_NULL, code=INTEGER)),
}

# Which of them each path answers with, if it answers with JSON.
OF_PATH: Mapping[str, str] = {
    "/v1/completions": "Completion",
    "/v1/chat/completions": "ChatCompletion",
    "/generate": "Generation",
    "/generate_stream": "Generation",
    "/v1/models": "ModelList",
    "/v1/models/{model}": "ModelCard",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/version": "Version",
    "/load": "Load",
    "/reset_prefix_cache": "Success",
    "/is_sleeping": "Sleep",
    "/server_info": "ServerInfo",
    "/tokenizer_info": "TokenizerInfo",
}
