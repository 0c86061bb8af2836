"""The client libraries: what to install, and the program that tries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One library: `packages`, the first of which is the library itself, and its program in `programs/`."""

    program: str
    packages: tuple[str, ...]
    npm: bool = False


LIBRARIES: Mapping[str, Library] = {
    "openai-2": Library("openai_chat.py", ("openai<3",)),
    "openai": Library("openai_chat.py", ("openai",)),
    "openai-responses": Library("openai_responses.py", ("openai",)),
    "openai-npm": Library("openai_chat.mjs", ("openai@latest", "zod@latest"), npm=True),
    "anthropic": Library("anthropic_messages.py", ("anthropic",)),
    "langchain": Library("langchain_chat.py", ("langchain", "langchain-openai")),
    "llama-index": Library("llama_index_chat.py", ("llama-index-llms-openai-like", "llama-index-core")),
    "pydantic-ai": Library("pydantic_ai_chat.py", ("pydantic-ai-slim[openai]",)),
    "instructor": Library("instructor_chat.py", ("instructor",)),
    "outlines": Library("outlines_chat.py", ("outlines", "openai")),
    "smolagents": Library("smolagents_chat.py", ("smolagents[openai]",)),
    "vercel-ai": Library(
        "vercel_ai.mjs", ("ai@latest", "@ai-sdk/openai-compatible@latest", "zod@latest"), npm=True
    ),
    "litellm": Library("litellm_proxy.py", ("litellm[proxy]",)),
}
