"""Special tokens of GGUF vocabularies: which end a generation, and what is ignored with a warning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.gguf_tokens import END_TEXTS, SpecialTokens, special_tokens
from microvllm.runtime.text.gguf_tokenizer import build_tokenizer
from microvllm.runtime.text.tokenizer import Tokenizer

LETTERS = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4


def vocabulary(special: Sequence[str], kind: int = CONTROL, **keys: Any) -> dict[str, Any]:
    """The metadata of a byte-level vocabulary that ends in `special`."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*LETTERS, *special],
        "tokenizer.ggml.token_type": [NORMAL] * len(LETTERS) + [kind] * len(special),
        "tokenizer.ggml.merges": [],
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def found(metadata: dict[str, Any], path: Path = Path("m.gguf")) -> SpecialTokens:
    return special_tokens(path, metadata)


def ends(metadata: dict[str, Any]) -> list[str]:
    return [metadata["tokenizer.ggml.tokens"][index] for index in found(metadata).ends]


@pytest.mark.parametrize("text", sorted(END_TEXTS))
def test_an_end_is_known_by_its_text(text: str) -> None:
    metadata = vocabulary(["<first>", text, "<last>"], eos_token_id=len(LETTERS))
    assert ends(metadata) == ["<first>", text]


def test_the_named_end_of_text_comes_first_and_each_end_once() -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    at = {text: len(LETTERS) + index for index, text in enumerate(special)}
    metadata = vocabulary(special, eos_token_id=at["<|eot_id|>"], bos_token_id=at["<|begin_of_text|>"])
    assert ends(metadata) == ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_an_end_is_known_by_the_key_that_names_it(key: str) -> None:
    assert ends(vocabulary(["<x>", "<y>"], **{f"{key}_token_id": len(LETTERS) + 1})) == ["<y>"]


@pytest.mark.parametrize("key", ["bos", "unknown", "padding", "seperator", "mask", "fim_pre", "fim_suf"])
def test_other_named_tokens_end_nothing(key: str) -> None:
    assert ends(vocabulary(["<x>", "<y>"], **{f"{key}_token_id": len(LETTERS) + 1})) == []


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|return|>", "<|call|>", "<|end|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
        (["<|return|>", "<|end|>"], ["<|return|>", "<|end|>"]),
        (["</s>", "<|tool_response>", "<turn|>"], ["<|tool_response>", "<turn|>"]),
        (["<|im_start|>", "<s>", "<|user|>"], []),
    ],
)
def test_what_separates_the_parts_of_an_answer_is_no_end(special: list[str], expected: list[str]) -> None:
    assert ends(vocabulary(special)) == expected


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL])
def test_a_known_end_is_a_control_token_whatever_its_type(kind: int) -> None:
    built = build_tokenizer(Path("m.gguf"), vocabulary(["<|im_end|>", "<other>"], kind))
    tokenizer = Tokenizer(built.backend, built.named)
    assert tokenizer.encode("<|im_end|>") == [len(LETTERS)]
    assert tokenizer.decode([len(LETTERS)]) == ""
    assert (len(LETTERS) + 1 in tokenizer.special_ids) == (kind == CONTROL)


@pytest.mark.parametrize("value", [-1, (1 << 32) - 1, len(LETTERS) + 1, 10**6])
@pytest.mark.parametrize("key", ["bos", "eos", "eot", "unknown", "padding", "fim_pad", "mask"])
def test_an_id_outside_of_the_vocabulary_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: int
) -> None:
    metadata = vocabulary(["<|endoftext|>"], **{f"{key}_token_id": value})
    assert f"{key}_token_id" not in found(metadata, tmp_path / "m.gguf").named
    assert f"tokenizer.ggml.{key}_token_id {value} is ignored" in caplog.text
    caplog.clear()
    build_tokenizer(tmp_path / "m.gguf", metadata)
    assert not caplog.text, "the same file is read for the model and for the tokenizer"


@pytest.mark.parametrize("value", ["2", 2.0, True, [2.5]])
def test_an_id_that_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.eot_token_id must be a token id"):
        found(vocabulary(["<x>"], eot_token_id=value))


def test_a_sentencepiece_vocabulary_that_names_nothing_has_the_usual_ids() -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"]}
    assert found(metadata).named == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    assert found({**metadata, "tokenizer.ggml.bos_token_id": 3}).named["bos_token_id"] == 3
    assert found(metadata).ends == (2,)
