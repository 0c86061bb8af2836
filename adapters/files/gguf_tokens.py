"""Finds the special tokens of a GGUF vocabulary, by the keys that name them and by their texts.

Most files name one end token, whatever else their model ends a turn or a message with. llama.cpp, which
they are made for, therefore adds the tokens it knows by their text, and makes control tokens of them
(`special_eog_ids` in src/llama-vocab.cpp). The same rules hold here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from microvllm.adapters.files.fields import MAX_SIZE, Fields

PREFIX = "tokenizer.ggml."
# A key may name a token that ends the text, a turn or a message, or one after which an editor's
# fill-in-the-middle request has nothing more to say.
END_KEYS = tuple(f"{role}_token_id" for role in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
END_TEXTS = frozenset(
    (
        # of a text ("\uff5c" is DeepSeek's bar, "\u2581" SentencePiece's space)
        *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "<|flush|>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        # of a turn
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]"),
        *("<end_of_utterance>", "[e~[", "<|return|>"),
        # of a message, most of them a call of a tool
        *("<|eom_id|>", "<|call|>", "<|calls|>", "<|tool_response>"),
        # of the output of a fill-in-the-middle request
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
# In a vocabulary that has all of the first, the second only separates the parts of one response.
NOT_AN_END = (
    (("<|return|>", "<|call|>"), "<|end|>"),
    (("<|return|>", "<|calls|>"), "<|end|>"),
    (("<|call|>", "<|flush|>"), "<|end|>"),
    (("<|calls|>", "<|flush|>"), "<|end|>"),
    (("<|tool_response>",), "</s>"),
)
# Ids of SentencePiece vocabularies that name none.
SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


class SpecialTokens(NamedTuple):
    """Token ids, all within the vocabulary."""

    named: dict[str, int]  # by key, without its prefix: "eos_token_id" -> id
    ends: tuple[int, ...]  # after which nothing is generated; the one named end of text first
    known_ends: frozenset[int]  # those found by their text: control tokens, whatever type the file gives


def special_tokens(path: Path, metadata: Mapping[str, Any]) -> SpecialTokens:
    """Find the special tokens of the vocabulary in `metadata`.

    An id that is no token of the vocabulary (-1 for "none", or padding beyond its end) is ignored with a
    warning. `ModelFileError` for an id that is no integer.
    """
    listed = metadata.get(f"{PREFIX}tokens")
    tokens = listed if isinstance(listed, list) else []
    size = len(tokens) or MAX_SIZE
    fields = Fields(path, {k[len(PREFIX) :]: v for k, v in metadata.items() if k.startswith(PREFIX)}, PREFIX)
    named = dict(SENTENCEPIECE_IDS) if fields.get("model") == "llama" and len(tokens) > 2 else {}
    ends: dict[int, None] = {}
    for key in sorted(key for key in fields if key.endswith("_token_id")):
        ids = fields.token_ids(key, size)
        if ids:
            named[key] = ids[0]
        if key in END_KEYS:
            ends.update(dict.fromkeys(ids))
    known = {text: index for index, text in enumerate(tokens) if text in END_TEXTS}
    for others, text in NOT_AN_END:
        if known.keys() >= set(others):
            known.pop(text, None)
    if "eos_token_id" in named:
        ends = {named["eos_token_id"]: None, **ends}
    ends.update(dict.fromkeys(sorted(known.values())))
    return SpecialTokens(named, tuple(ends), frozenset(known.values()))
