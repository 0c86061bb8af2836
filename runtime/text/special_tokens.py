"""Adds to a tokenizer.json what the files beside it say about tokens: which are special, and which are new.

The rules, and where they surprise, are those of `AutoTokenizer` of transformers 5. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
# What a tokenizer class of transformers names where the configuration does not.
_END_OF_TEXT = "<|endoftext|>"
_CLASS_TOKENS = {
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT),
}
_MODEL_CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


def add_special_tokens(
    backend: Backend,
    config: Mapping[str, Any],
    *,
    special_tokens_map: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
    model_type: object = None,
) -> dict[str, str]:
    """Adds the tokens of a folder's files to `backend`; returns the texts of those with a name ("eos_token").

    `config` is tokenizer_config.json. The other two, special_tokens_map.json and added_tokens.json, count
    only if it has no `added_tokens_decoder`. Whether BOS or EOS is put around a text is decided by
    tokenizer.json alone. Entries of another form than the files have are passed over.
    """
    usual = _class_tokens(backend, config, model_type) | _tokens_of(config, usual=True)
    own = _tokens_of(config, usual=False)
    listed, extra, further = (
        config.get(name)
        for name in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
    )
    if further is not None and not extra:  # the older name of the same
        extra, further = further, None
    extra, own = _without_names(extra, own)
    if isinstance(listed, dict):
        tokens = dict(_listed(listed))
    else:
        usual |= _tokens_of(special_tokens_map, usual=True)
        further = special_tokens_map.get("additional_special_tokens", further)
        more, own = _without_names(special_tokens_map.get("extra_special_tokens"), own)
        own = _tokens_of(special_tokens_map, usual=False) | own
        extra = extra if more is None else [*(extra or []), *more]
        special = {token.content for token in (*usual.values(), *(extra or []))}
        tokens = {
            index: AddedToken(text, special=text in special, normalized=text not in special)
            for text, index in added_tokens.items()
            if text and type(index) is int
        }
        tokens |= backend.get_added_tokens_decoder()
    if extra is None:
        extra, own = _without_names(further, own)
    named = usual | own
    _add(backend, [tokens[index] for index in sorted(tokens)], named, extra or [])
    return {name: token.content for name, token in named.items()}


def _add(
    backend: Backend, tokens: list[AddedToken], named: Mapping[str, AddedToken], extra: Iterable[AddedToken]
) -> None:
    special = {token.content for token in named.values()}
    known = {token.content for token in (*tokens, *backend.get_added_tokens_decoder().values())}
    usual = [named[name] for name in NAMED_TOKENS if name in named]  # new tokens get their ids in this order
    for token in (*usual, *named.values(), *extra):
        if token.content not in known:
            tokens.append(token)
            known.add(token.content)
    for token in tokens:
        # A token that is only in a list of special ones keeps what tokenizer.json says of it.
        token.special = token.special or token.content in special
    backend.add_tokens(tokens)


def _class_tokens(backend: Backend, config: Mapping[str, Any], model_type: object) -> dict[str, AddedToken]:
    """Return the names that the tokenizer's class has by itself, unless the vocabulary lacks them."""
    name = _MODEL_CLASSES.get(str(model_type), str(config.get("tokenizer_class")).removesuffix("Fast"))
    return {
        name: AddedToken(text, special=True)
        for name, text in _CLASS_TOKENS.get(name, {}).items()
        if name not in config and backend.token_to_id(text) is not None
    }


def _tokens_of(config: Mapping[str, Any], *, usual: bool) -> dict[str, AddedToken]:
    """Return the tokens under their usual names, or under a model's own such as `image_token`."""
    found = {
        name: _token(value)
        for name, value in config.items()
        if (name in NAMED_TOKENS) is usual and name.endswith("_token")
    }
    return {name: token for name, token in found.items() if token is not None}


def _without_names(
    extra: Any, named: dict[str, AddedToken]
) -> tuple[list[AddedToken] | None, dict[str, AddedToken]]:
    """Read a list of special tokens. An object in its place gives names to `named`, and no list."""
    if isinstance(extra, dict):
        found = {str(name): _token(value) for name, value in extra.items()}
        return None, named | {name: token for name, token in found.items() if token is not None}
    if not isinstance(extra, list):
        return None, named
    return [token for token in map(_token, extra) if token is not None], named


def _listed(entries: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    for key, value in entries.items():
        token = _token(value, special=isinstance(value, dict) and bool(value.get("special")))
        if isinstance(value, dict) and key.isdecimal() and token is not None:
            yield int(key), token


def _token(value: Any, special: bool = True) -> AddedToken | None:
    """A token is written as its text, or as an object with `content` and flags."""
    entry = value if isinstance(value, dict) else {"content": value}
    text = entry.get("content")
    if not isinstance(text, str) or not text:
        return None
    flags = {flag: bool(entry[flag]) for flag in ADDED_TOKEN_FLAGS if flag in entry}
    return AddedToken(text, special=special, **flags)  # without the flag, only a plain one is normalized
