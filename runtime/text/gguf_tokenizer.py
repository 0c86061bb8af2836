"""Builds a `tokenizers.Tokenizer` from the `tokenizer.ggml.*` metadata of a GGUF file.

Three kinds exist for the models served here: "gpt2" (byte-level BPE with a list of merges and a named
pre-tokenizer), "llama" (SentencePiece BPE with scores and byte fallback) and "gemma4" (the same with a list
of merges). The key names are those of
the GGUF specification; where a file leaves something out, llama.cpp's default is used, because that is
what the file was made for. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.gguf_tokens import special_tokens

# `tokenizer.ggml.token_type`, by number.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
SPACE = "\u2581"  # how SentencePiece writes a space

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As Qwen2's, but that marks go with letters.
_QWEN35_SPLIT = _QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
# o200k_base of tiktoken: as Tekken's, but with contractions, and digits by three.
_O200K_SPLIT = (
    _TEKKEN_SPLIT.replace(r"\p{M}]+|", rf"\p{{M}}]+{_CONTRACTION}?|")
    .replace(r"\p{M}]*|", rf"\p{{M}}]*{_CONTRACTION}?|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
_SEED_SPLIT = _QWEN2_SPLIT.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_DEEPSEEK_SPLIT = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """One value of `tokenizer.ggml.pre`: the splits made one after the other, and its defaults."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a whole token is taken as it is
    add_bos: bool = False  # when the file has no add_bos_token
    nfc: bool = False  # the model's own tokenizer.json normalises to NFC


_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2_SPLIT))
_GPT2 = PreTokenizer((_GPT2_SPLIT,))
_LLAMA3 = PreTokenizer((_LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_QWEN2_SPLIT,), nfc=True)
_LLAMA3_MERGED = PreTokenizer((_LLAMA3_SPLIT,))
_TEKKEN = PreTokenizer((_TEKKEN_SPLIT,), ignore_merges=True, add_bos=True)
# Most names are another model's for a rule that was there before, as in llama.cpp's own table; it normalises
# nothing, so that only those are normalised here whose own tokenizers are known to.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: rule
    for rule, names in (
        (PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")), "default"),
        (
            _GPT2,
            "gpt-2 a.x-4.0 exaone4 gigachat granite-docling jais mellum modern-bert mpt olmo phi-2 trillion",
        ),
        (_GPT2, "jina-de jina-es jina-v2-de jina-v2-es"),
        (_SINGLE_DIGITS, "smollm starcoder codeshell command-r exaone mellum2 minerva-7b refact"),
        (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 jina-v5-nano lfm2 midm-2.0 pixtral"),
        (_LLAMA3_MERGED, "smaug-bpe chatglm-bpe dbrx glm4"),
        (_QWEN2, "qwen2 deepseek-r1-qwen"),
        (_QWEN2._replace(nfc=False), "f2llmv2 grok-2 hunyuan kormo megrez solar-open stablelm2"),
        (_TEKKEN, "tekken"),
        (PreTokenizer((_QWEN35_SPLIT,), nfc=True), "qwen35"),
        (PreTokenizer((_O200K_SPLIT,)), "gpt-4o minimax-m2"),
        (PreTokenizer((_SEED_SPLIT,)), "seed-coder"),
        (PreTokenizer((r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u30ff]+", _DEEPSEEK_SPLIT)), "deepseek-v3"),
    )
    for name in names.split()
}


class BuiltTokenizer(NamedTuple):
    """The backend, and what the files say beside it."""

    backend: Tokenizer
    named: dict[str, str]  # "bos_token" -> its text
    chat_template: str | None


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> BuiltTokenizer:
    """Return the tokenizer that `metadata` describes. Raises `ModelFileError` naming `path` and the key."""
    return _Builder(path, metadata).build()


class _Builder:
    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        listed = [str(token) for token in self._array("tokens")]
        # Some files are padded: with tokens that have no text, and with types and scores of no token.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(listed)]
        self.types = [int(kind) for kind in self._array("token_type", [NORMAL] * len(self.tokens))]
        if len(self.types) < len(self.tokens):
            raise self._error("token_type", f"has {len(self.types)} entries for {len(self.tokens)} tokens")
        self.vocab = {token: index for index, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise self._error("tokens", "holds the same token twice")
        special = special_tokens(path, metadata)
        self.named_ids = special.named
        for index in (*special.known_ends, *(index for index, token in enumerate(listed) if not token)):
            self.types[index] = CONTROL

    def build(self) -> BuiltTokenizer:
        kind = self.metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            backend, add_bos = self._byte_level()
        elif kind == "llama":
            backend, add_bos = self._sentencepiece()
        elif kind == "gemma4":
            backend, add_bos = self._sentencepiece(self._listed_merges())
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
        else:
            raise self._error("model", f"is {kind!r}; 'gpt2', 'llama' and 'gemma4' are supported")
        self._add_tokens(backend)
        named = {
            name: self.tokens[self.named_ids[key]]
            for name, key in NAMED_TOKENS.items()
            if key in self.named_ids
        }
        self._add_post_processor(backend, named, add_bos)
        template = self.metadata.get("tokenizer.chat_template")
        return BuiltTokenizer(backend, named, template if isinstance(template, str) and template else None)

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        name = self.metadata.get("tokenizer.ggml.pre", "default")
        pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if pre is None:
            raise self._error("pre", f"is {name!r}; supported are {', '.join(sorted(PRE_TOKENIZERS))}")
        backend = self._bpe(self._listed_merges(), ignore_merges=pre.ignore_merges)
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        backend.decoder = decoders.ByteLevel()
        return backend, pre.add_bos

    def _listed_merges(self) -> list[tuple[str, str]]:
        merges = []
        for merge in self._array("merges"):
            # A token holds a space only as U+0120 or U+2581, so the first space is the separator.
            left, _, right = str(merge).partition(" ")
            merges.append((left, right))
        return merges

    def _sentencepiece(self, merges: list[tuple[str, str]] | None = None) -> tuple[Tokenizer, bool]:
        """merges: those of the scores if there are none."""
        scores = [float(score) for score in self._array("scores", None if merges is None else [])]
        if merges is None and len(scores) < len(self.tokens):
            raise self._error("scores", f"has {len(scores)} entries for {len(self.tokens)} tokens")
        unknown = self.named_ids.get("unknown_token_id")
        backend = self._bpe(
            self._merges_from_scores(scores) if merges is None else merges,
            unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        # As llama.cpp does, the prefix space is put before every stretch of text between special tokens.
        prefix = self._flag("add_space_prefix", True)
        steps: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        chain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            chain.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(chain)
        return backend, True

    def _merges_from_scores(self, scores: list[float]) -> list[tuple[str, str]]:
        """SentencePiece merges the pair whose union has the best score: that order is the list of merges."""
        vocab, tokens = self.vocab, self.tokens
        ranked = []
        for index, token in enumerate(tokens):
            if self.types[index] == NORMAL:
                for cut in range(1, len(token)):
                    left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
                    if left is not None and right is not None:
                        ranked.append((-scores[index], left, right))
        ranked.sort()
        return [(tokens[left], tokens[right]) for _, left, right in ranked]

    def _bpe(self, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
        try:
            return Tokenizer(BPE(vocab=self.vocab, merges=merges, **options))
        except Exception as error:  # the Rust side raises plain Exception
            raise self._error("merges", f"does not fit the tokens ({error})") from error

    def _add_tokens(self, backend: Tokenizer) -> None:
        """Control tokens become special tokens, user-defined ones added tokens; both match before BPE."""
        added = [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(self.tokens, self.types, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
        backend.add_tokens(added)

    def _add_post_processor(self, backend: Tokenizer, named: Mapping[str, str], add_bos: bool) -> None:
        before, after = [], []
        if self._flag("add_bos_token", add_bos) and "bos_token" in named:
            before.append(named["bos_token"])
        if self._flag("add_eos_token", False) and "eos_token" in named:
            after.append(named["eos_token"])
        if before or after:
            backend.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                special_tokens=[(token, self.vocab[token]) for token in {*before, *after}],
            )

    def _array(self, key: str, default: Iterable[Any] | None = None) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise self._error(key, "is missing")
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            raise self._error(key, "is not an array")
        return value.tolist() if hasattr(value, "tolist") else list(value)

    def _flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(f"tokenizer.ggml.{key}", default))

    def _error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(self.path, f"tokenizer.ggml.{key} {problem}")
