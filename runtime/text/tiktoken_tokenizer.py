"""Builds a `tokenizers.Tokenizer` from the `qwen.tiktoken` of the first Qwen models. Torch-free.

The file is tiktoken's: a line for each token, its bytes in base64 and its rank, which is its id. tiktoken
merges whichever neighbours give the lowest rank. As each token has one pair of lower ranks that it is merged
from, a list of these pairs in the order of the ranks does the same.
The special tokens, the way in which text is split, and the chat format are in no file of the model: they
are those of Qwen's own tokenizer class and of its `chat()`.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.hf_config import read_json
from microvllm.runtime.text.gguf_tokenizer import PRE_TOKENIZERS, BuiltTokenizer
from microvllm.runtime.text.token_bytes import ByteLevelAlphabet

MAX_FILE_BYTES = 16 << 20  # six times Qwen's
MAX_TOKEN_BYTES = 128  # Qwen's longest; how a token is made of others takes time in the square of this
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{index}|>" for index in range(205)))
CHAT_TEMPLATE = """\
{%- if messages[0].role != "system" -%}
    {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def build_tokenizer(file: Path) -> BuiltTokenizer:
    """Return the tokenizer of a `qwen.tiktoken` file, whose folder is the model's.

    A model whose generation_config.json says `"chat_format": "chatml"` ends its turns with <|im_end|> and has
    the ChatML template; another is a base model. Raises `ModelFileError` naming the file and the line.
    """
    tokens = _read_tokens(file)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise ModelFileError(file, "holds the same token twice")
    alphabet = ByteLevelAlphabet()
    spelled = {token: alphabet.from_bytes(token) for token in tokens}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = _split(token, ranks, rank)
            if len(parts) != 2:
                raise ModelFileError(file, f"line {rank + 1}: no two tokens before it make up this one")
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    backend = Tokenizer(BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges))
    backend.normalizer = normalizers.NFC()
    (split,) = PRE_TOKENIZERS["qwen2"].splits
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]  # ids follow the ranks
    )
    settings = file.parent / "generation_config.json"
    if settings.exists() and read_json(settings).get("chat_format") == "chatml":
        return BuiltTokenizer(backend, {"eos_token": IM_END, "pad_token": END_OF_TEXT}, CHAT_TEMPLATE)
    return BuiltTokenizer(backend, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, None)


def _read_tokens(file: Path) -> list[bytes]:
    """Return the bytes of each token, in the order of their ranks."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ModelFileError(file, f"larger than {MAX_FILE_BYTES >> 20} MiB, which no such file is")
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ModelFileError(file, f"cannot be read ({error.strerror})") from None
    tokens: list[bytes] = []
    for number, line in enumerate(lines, 1):
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise ModelFileError(file, f"line {number}: is not a token in base64 and its rank") from None
        if not 1 <= len(token) <= MAX_TOKEN_BYTES:
            raise ModelFileError(
                file, f"line {number}: a token must have 1 to {MAX_TOKEN_BYTES} bytes, this has {len(token)}"
            )
        if rank != b"%d" % len(tokens):
            raise ModelFileError(file, f"line {number}: the rank must be {len(tokens)}")
        tokens.append(token)
    missing = 256 - len({token for token in tokens if len(token) == 1})
    if missing:
        raise ModelFileError(file, f"lacks {missing} of the 256 single bytes")
    return tokens


def _split(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """`token` merged as tiktoken merges, by ranks below `limit` alone."""
    parts = [token[index : index + 1] for index in range(len(token))]
    pairs = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest >= limit:
            break
        index = pairs.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
        del pairs[index]
        for changed in range(max(0, index - 1), min(index + 1, len(pairs))):
            pairs[changed] = ranks.get(parts[changed] + parts[changed + 1], limit)
    return parts
