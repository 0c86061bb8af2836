"""`Tokenizer`: text <-> token ids for a Hugging Face folder or a GGUF file, over the `tokenizers` library.

Torch-free. transformers is imported only for folders without a `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import shorten
from microvllm.adapters.files.hf_config import read_json
from microvllm.adapters.files.regular_files import check_folder
from microvllm.runtime.errors import ConfigError, EngineError, InvalidRequestError
from microvllm.runtime.text.growth import check_growth
from microvllm.runtime.text.special_tokens import add_special_tokens
from microvllm.runtime.text.token_bytes import TokenBytes, build_token_bytes

TIKTOKEN_FILE = "qwen.tiktoken"
# Without one of these there is nothing that transformers could convert.
MIN_ID_LIMIT = 1 << 20  # of token ids, whatever the number of tokens
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


class Tokenizer:
    """A thin, immutable wrapper over `tokenizers.Tokenizer`; safe to use from several threads.

    `backend` is the library's object. `vocab_size` is the highest token id plus one, added tokens included
    (the model's embedding may have more rows). `special_tokens` maps "bos_token", "eos_token", ... to their
    texts, for the chat template. `chat_templates` maps the names of the model's templates to their texts;
    `chat_template` is the one named "default". `token_bytes` is the detokenizer's table, None for decoders
    without one.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        # tokenizer.json may carry the truncation of a training run, which would shorten prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        if isinstance(chat_template, str):
            chat_template = {"default": chat_template}
        self.chat_templates = dict(chat_template or {})
        self.chat_template = self.chat_templates.get("default")
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.token_bytes: TokenBytes | None = build_token_bytes(backend.decoder, vocab, self.special_ids)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load from a Hugging Face folder or from one `.gguf` file; `ConfigError` names the file at fault."""
        try:
            return cls._from_folder(path) if path.is_dir() else cls._from_gguf(path)
        except ModelFileError as error:
            raise ConfigError(str(error), remedy=error.remedy) from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        The texts of special tokens are recognised in it, as Hugging Face tokenizers do. `add_special_tokens`
        adds those that the model puts around every text (BOS). `InvalidRequestError` for a lone surrogate,
        and for what the model's rules cannot cope with.
        """
        try:
            # Only a batch is encoded without the interpreter's lock, under which nothing else would go on.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequestError("The text holds a lone surrogate, which no UTF-8 text can.") from None
        except BaseException as error:
            if not failed_in_library(error):
                raise
            raise InvalidRequestError(
                f"The model's tokenizer cannot read the text ({one_line(error)})."
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids: unknown ids contribute nothing, broken UTF-8 becomes U+FFFD.

        Raises `EngineError` for ids that the model's rules cannot cope with.
        """
        size = self.vocab_size
        known = [index for index in ids if 0 <= index < size]
        try:
            return self.backend.decode(known, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            if not failed_in_library(error):
                raise
            raise EngineError(f"the model's tokenizer cannot write the output ({one_line(error)})") from None

    def id_to_token(self, id: int) -> str | None:
        """Return the token as the vocabulary spells it ("Ġthe"), or None for an unknown id."""
        return self.backend.id_to_token(id) if 0 <= id < self.vocab_size else None

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        from microvllm.adapters.files.gguf_file import GGUFFile
        from microvllm.runtime.text.gguf_tokenizer import build_tokenizer

        built = build_tokenizer(path, GGUFFile(path).metadata)
        check_growth(built.backend, path)
        return cls(built.backend, built.named, built.chat_template)

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        check_folder(folder)
        config = _read_optional(folder / "tokenizer_config.json")
        templates = _chat_templates(folder, config)
        file = folder / "tokenizer.json"
        if not file.is_file() and not (folder / TIKTOKEN_FILE).is_file():
            backend, special = _convert_slow_tokenizer(folder)
            _check_ids(backend, folder)
            check_growth(backend, folder)
            return cls(backend, special, templates)
        built = None
        if file.is_file():
            backend = _read_backend(file)
        else:
            from microvllm.runtime.text.tiktoken_tokenizer import build_tokenizer

            built = build_tokenizer(folder / TIKTOKEN_FILE)
            backend = built.backend
        _check_ids(backend, file if built is None else folder / TIKTOKEN_FILE)
        check_growth(backend, file if built is None else folder / TIKTOKEN_FILE)
        named = add_special_tokens(
            backend,
            config,
            special_tokens_map=_read_optional(folder / "special_tokens_map.json"),
            added_tokens=_read_optional(folder / "added_tokens.json"),
            model_type=_read_optional(folder / "config.json").get("model_type"),
        )
        if built is not None:
            return cls(backend, {**built.named, **named}, templates or built.chat_template)
        return cls(backend, named, templates)


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def failed_in_library(error: BaseException) -> bool:
    """Whether an exception is one of the library's: plain ones, and panics, which are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's text, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_backend(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except BaseException as error:
        if not failed_in_library(error):
            raise
        raise ModelFileError(file, f"is not a usable tokenizer ({one_line(error)})") from error


def _check_ids(backend: Backend, file: Path) -> None:
    """Raises `ModelFileError` for an id that tables with an entry for each id would be too large for."""
    vocab = backend.get_vocab(with_added_tokens=True)
    token = max(vocab, key=vocab.__getitem__, default="")
    if vocab and vocab[token] >= max(MIN_ID_LIMIT, 2 * len(vocab)):
        raise ModelFileError(
            file, f"token {shorten(token)} has the id {vocab[token]}, but there are {len(vocab)} tokens"
        )


def _convert_slow_tokenizer(folder: Path) -> tuple[Backend, dict[str, str]]:
    """Lets transformers convert a tokenizer that has only SentencePiece or vocabulary files.

    Returns it with the texts of its named tokens.
    """
    if not any((folder / name).is_file() for name in SLOW_TOKENIZER_FILES):
        raise ModelFileError(folder, "holds no tokenizer.json, and no other tokenizer file either")
    from transformers import AutoTokenizer  # seconds to import: only here

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # transformers raises many kinds, ImportError for sentencepiece among them
        if not failed_in_library(error):
            raise
        raise ModelFileError(
            folder,
            f"holds no tokenizer.json, and transformers cannot convert what it has ({one_line(error)})",
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelFileError(folder, f"holds no tokenizer.json, and {type(slow).__name__} has no fast form")
    return backend, {name: str(token) for name, token in slow.special_tokens_map.items() if token}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by name. Template files in the folder replace those of tokenizer_config.json."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    found = config.get("chat_template")
    if isinstance(found, list):  # of {"name": ..., "template": ...}
        found = {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
    elif isinstance(found, str):
        found = {"default": found} if found else {}
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in (*found, *found.values())):
        raise ModelFileError(
            folder / "tokenizer_config.json", "chat_template must be a string or a list of named ones"
        )
    return found


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ModelFileError(file, f"is not readable as UTF-8 text ({one_line(error)})") from error
