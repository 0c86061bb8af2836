"""Reads the prompts of the offline API: texts, token ids, vLLM's `TextPrompt` and `TokensPrompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypedDict

from microvllm.runtime.errors import InvalidRequestError

WRONG_PROMPT = "a prompt must be a text, a list of token ids, or a dict with either"


class TextPrompt(TypedDict, total=False):
    """A text; `cache_salt` separates its blocks in the prefix cache from others'."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """Token ids, and the text that they came from, if it is known."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


KNOWN_KEYS = {*TextPrompt.__annotations__, *TokensPrompt.__annotations__, "type"}
OTHER_INPUTS = {"encoder_prompt", "multi_modal_data", "prompt_embeds"}  # what a prompt may be in vLLM

Prompt: TypeAlias = "str | list[int] | TextPrompt | TokensPrompt | Mapping[str, Any]"


class OfflinePrompt(NamedTuple):
    """One prompt: `ids` are None while `text` has to be tokenized."""

    text: str | None
    ids: list[int] | None
    cache_salt: str = ""


def read_prompts(prompts: Any) -> list[OfflinePrompt]:
    """Return the prompts of one call; a flat list of ids is one. Raises `InvalidRequestError`."""
    if isinstance(prompts, (str, Mapping)):
        return [read_prompt(prompts)]
    if not isinstance(prompts, Sequence):
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(WRONG_PROMPT, "prompt")
    if prompts and all(type(item) is int for item in prompts):
        return [read_prompt(prompts)]
    return [read_prompt(prompt) for prompt in prompts]


def read_prompt(prompt: Any) -> OfflinePrompt:
    """Read one prompt. A key of a dict that requests something else, such as images, is refused by name."""
    if isinstance(prompt, Mapping):
        return _read_dict(prompt)
    if isinstance(prompt, str):
        return OfflinePrompt(prompt, None)
    return OfflinePrompt(None, _ids(prompt))


def _read_dict(prompt: Mapping[str, Any]) -> OfflinePrompt:
    text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if text is None and ids is None and not OTHER_INPUTS & prompt.keys():
        raise InvalidRequestError(WRONG_PROMPT, "prompt")
    for name in sorted(prompt.keys() - KNOWN_KEYS, key=str):
        if prompt[name] is not None and prompt[name] != {}:
            raise InvalidRequestError(
                f"{name} of a prompt is not supported: this model reads text only.", name
            )
    if (text is None and ids is None) or (text is not None and not isinstance(text, str)):
        raise InvalidRequestError(WRONG_PROMPT, "prompt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError(f"cache_salt must be a non-empty string, got {salt!r}.", "cache_salt")
    return OfflinePrompt(text, None if ids is None else _ids(ids), salt or "")


def _ids(value: Any) -> list[int]:
    if hasattr(value, "tolist"):  # an array or a tensor
        value = value.tolist()
    if isinstance(value, Sequence) and all(type(item) is int for item in value):
        return list(value)
    raise InvalidRequestError(WRONG_PROMPT, "prompt")
