"""Defines the request bodies of the endpoints that make vectors, or scores of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from microvllm.openai_compat.api.requests import (
    TEXT,
    TEXTS,
    TOKEN_LISTS,
    TOKENS,
    Body,
    CacheSalt,
    Messages,
    RequestId,
    TemplateKwargs,
)
from microvllm.runtime.request import INT64_MAX, Count, Int64

Input = Annotated[
    Any,
    Meta(
        extra_json_schema={
            "anyOf": [TEXT, TOKENS, TEXTS, TOKEN_LISTS, {"type": "array", "items": {"type": "object"}}]
        }
    ),
]
Texts = Annotated[Any, Meta(extra_json_schema={"anyOf": [TEXT, TEXTS]})]


class VectorRequest(Body, kw_only=True):
    """The fields that all endpoints for vectors have in common."""

    ignored: ClassVar[tuple[str, ...]] = ("user", "mm_processor_kwargs")
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"padding": ("do_not_pad",), "normalize": ()}

    model: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: CacheSalt = ""
    priority: Int64 = 0
    request_id: RequestId | None = None


class EmbeddingRequest(VectorRequest, kw_only=True):
    """The body of /v1/embeddings."""

    ignored = (*VectorRequest.ignored, "media_io_kwargs")
    refused = {
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "chat_template": (),
        **VectorRequest.refused,
    }

    input: Input = None
    messages: Messages | None = None
    dimensions: Int64 | None = None
    encoding_format: Literal["float", "base64"] = "float"
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}


class ScoringRequest(VectorRequest, kw_only=True):
    """What scores and rerankings have in common. A cosine is the same of normalised vectors and of others."""

    refused = {"instruction": (), "chat_template_kwargs": ({},), **VectorRequest.refused}

    max_tokens_per_query: Count = 0
    max_tokens_per_doc: Count = 0


class ScoreRequest(ScoringRequest, kw_only=True):
    """The body of /score: two texts or lists of texts, under one of vLLM's pairs of names."""

    queries: Texts = None
    documents: Texts = None
    items: Texts = None
    data_1: Texts = None
    data_2: Texts = None
    text_1: Texts = None
    text_2: Texts = None


class RerankRequest(ScoringRequest, kw_only=True):
    """The body of /rerank."""

    query: Annotated[str, Meta(min_length=1)]
    documents: Texts
    top_n: Count = 0
