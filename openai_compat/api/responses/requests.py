"""Defines the body of /v1/responses: OpenAI's fields, and the sampling fields that all endpoints share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from microvllm.openai_compat.api.requests import (
    MAX_TOOLS,
    Effort,
    GenerationRequest,
    NonEmpty,
    TemplateKwargs,
)
from microvllm.runtime.request import INT64_MAX, Int64
from microvllm.runtime.text.chat_template import MAX_MESSAGES

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
# Beside the two above: parts of the calls of tools and of images, which no response has.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
# Of what is repeated in each state of the response, and held until its last.
MAX_NOTE_CHARS = 512  # as at OpenAI
MAX_REPEATED_BYTES = 1 << 20  # of tools, their choice and the form of the output, as JSON
Note = Annotated[str, Meta(max_length=MAX_NOTE_CHARS)]
_OBJECTS = {"items": {"type": "object"}}
_CHOICES = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}


class TextConfig(msgspec.Struct, kw_only=True):
    """`text`: the form of the output. `verbosity` is for models that this server does not have."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct, kw_only=True):
    """`reasoning`: how much to think. There is no other model that could write a summary of it."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class ResponsesRequest(GenerationRequest, kw_only=True):
    """The body of /v1/responses."""

    ignored = (
        *(
            name
            for name in GenerationRequest.ignored
            if name not in ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
        ),
        "max_tool_calls",  # of tools that the server runs, of which there are none
        "image",
        "client_metadata",
    )
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "conversation": (),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
        "access_programs": ({},),
        "background_options": ({},),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "previous_response": (),
        "personality": (),
        "previous_input_messages": ([],),
        "enable_response_messages": (False,),
        # the names that other endpoints have for fields of this one
        "messages": (),
        "max_tokens": (),
        "max_completion_tokens": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "logprobs": (False,),
        **{
            name: harmless
            for name, harmless in GenerationRequest.refused.items()
            if name != "thinking_token_budget"
        },
        # what has no place in the response
        "stream_options": ({}, {"include_obfuscation": False}, {"include_usage": True}),
        "n": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "echo": (False,),
        "prompt_logprobs": (),
        "logprob_token_ids": ([],),
        "return_token_ids": (False,),
    }
    renamed = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "logprobs": "top_logprobs",
    }

    input: str | Annotated[list[Any], Meta(max_length=MAX_MESSAGES, extra_json_schema=_OBJECTS)]
    instructions: str | None = None
    previous_response_id: NonEmpty | None = None
    store: bool | None = None
    background: bool = False
    max_output_tokens: Int64 | None = None
    top_logprobs: Int64 = 0
    include: Annotated[list[Includable], Meta(max_length=64)] = []
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tools: Annotated[list[Any], Meta(max_length=MAX_TOOLS, extra_json_schema=_OBJECTS)] = []
    tool_choice: Annotated[Any, Meta(extra_json_schema=_CHOICES)] = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: TemplateKwargs = {}
    include_reasoning: bool = True
    thinking_token_budget: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    # repeated in the response
    metadata: Annotated[dict[str, Note], Meta(max_length=16)] | None = None
    user: Note | None = None
    safety_identifier: Note | None = None
    prompt_cache_key: Note | None = None
