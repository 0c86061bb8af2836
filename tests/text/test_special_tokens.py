"""Which tokens are special: what AutoTokenizer of transformers makes of the same folder, file by file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from microvllm.runtime.text.special_tokens import NAMED_TOKENS
from microvllm.runtime.text.tokenizer import Tokenizer

NAMES = ["<a>", "<b>", "<tool>", "<|endoftext|>", "the", "<s>"]
TEXTS = ["x <a> y", "the<tool>the <b>  <s>", "<|endoftext|><a><b>\n<tool> other </s>"]


def backend(special: list[str], plain: list[str]) -> Backend:
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Backend(models.BPE(vocab={**vocab, "th": 256, "the": 257}, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def write(
    folder: Path, special: Any = (), plain: Any = (), config: dict[str, Any] | None = None, **files: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    backend([*special], [*plain]).save(str(folder / "tokenizer.json"))
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def check(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), Tokenizer.load(folder)
    added = ours.backend.get_added_tokens_decoder()
    assert {index: repr(token) for index, token in added.items()} == {
        index: repr(token) for index, token in theirs.added_tokens_decoder.items()
    }
    assert ours.special_tokens == {name: str(token) for name, token in theirs.special_tokens_map.items()}
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    return ours


FLAGS = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
FOLDERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a name that is plain": {"plain": ["<a>"], "config": {"eos_token": "<a>"}},
    "a name that is a word": {"config": {"bos_token": "the"}},
    "a name that is new": {"config": {"pad_token": "<a>"}},
    "a name with flags": {"config": {"pad_token": {"__type": "AddedToken", "content": "<a>", **FLAGS}}},
    "a name that is null": {"plain": ["<a>"], "config": {"eos_token": None}},
    "list, plain and new": {"plain": ["<a>"], "config": {"additional_special_tokens": ["<a>", "<b>"]}},
    "extra list": {"plain": ["<a>"], "config": {"extra_special_tokens": ["<a>", "<b>"]}},
    "both lists": {"config": {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]}},
    "extra object": {"plain": ["<tool>"], "config": {"extra_special_tokens": {"tool_token": "<tool>"}}},
    "extra object, new": {"config": {"extra_special_tokens": {"tool": "<tool>", "b_token": "<b>"}}},
    "a name of the model": {"plain": ["<a>"], "config": {"image_token": "<a>", "add_bos_token": True}},
    "added tokens": {"added_tokens": {"<tool>": 259, "<a>": 258}},
    "added tokens, other ids": {"plain": ["<b>"], "added_tokens": {"<tool>": 400, "<a>": 300}},
    "added tokens, a name": {"config": {"eos_token": "<a>"}, "added_tokens": {"<a>": 258}},
    "added tokens, listed": {
        "config": {"additional_special_tokens": ["<a>"]},
        "added_tokens": {"<a>": 258, "<b>": 259},
    },
    "added tokens, overruled": {
        "config": {"added_tokens_decoder": {"258": {"content": "<b>", "special": True}}},
        "added_tokens": {"<a>": 258},
    },
    "decoder, other flags": {
        "plain": ["<a>", "<b>"],
        "config": {
            "added_tokens_decoder": {
                "258": {"content": "<a>", "special": True},
                "259": {"content": "<b>", **FLAGS},
            }
        },
    },
    "decoder, new": {
        "config": {
            "added_tokens_decoder": {
                "1000": {"content": "<a>", "special": True},
                "999": {"content": "<b>", "special": False},
            }
        }
    },
    "decoder without a special one": {"special": ["<a>"], "config": {"added_tokens_decoder": {}}},
    "map": {"plain": ["<a>", "<b>"], "special_tokens_map": {"eos_token": {"content": "<b>", **FLAGS}}},
    "map over configuration": {
        "plain": ["<a>", "<b>"],
        "config": {"eos_token": "<a>"},
        "special_tokens_map": {"eos_token": "<b>"},
    },
    "map beside a decoder": {
        "plain": ["<a>", "<b>"],
        "config": {"eos_token": "<a>", "added_tokens_decoder": {}},
        "special_tokens_map": {"eos_token": "<b>"},
    },
    "map with the list": {"special_tokens_map": {"additional_special_tokens": ["<a>", "<b>"]}},
    "map and configuration with the list": {
        "config": {"additional_special_tokens": ["<b>"]},
        "special_tokens_map": {"additional_special_tokens": ["<a>"]},
    },
    "map with more": {
        "config": {"extra_special_tokens": ["<b>"]},
        "special_tokens_map": {"extra_special_tokens": ["<b>", "<a>"]},
    },
    "map with an object": {
        "plain": ["<b>"],
        "special_tokens_map": {"extra_special_tokens": {"x_token": "<b>"}},
    },
    "map, a name of the model": {"plain": ["<b>"], "special_tokens_map": {"tool_token": "<b>"}},
    "the model's configuration": {"plain": ["<a>"], "config_": {"model_type": "llama", "eos_token_id": 258}},
    "names of Qwen2": {"plain": ["<|endoftext|>"], "config_": {"model_type": "qwen2"}},
    "names of Qwen2, some given": {
        "plain": ["<|endoftext|>", "<a>"],
        "config": {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<a>", "unk_token": None},
    },
    "names of GPT-2": {"plain": ["<|endoftext|>"], "config": {"tokenizer_class": "GPT2Tokenizer"}},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    parts = dict(FOLDERS[name])
    model = parts.pop("config_", None)
    folder = write(tmp_path / "model", **parts)
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    check(folder)


def random_folder(draw: random.Random, path: Path) -> Path:
    """Any of the files, with any tokens in them."""

    def some(least: int = 0) -> list[str]:
        return draw.sample(NAMES, draw.randint(least, 3))

    def entry(text: str) -> dict[str, Any]:
        flags = draw.sample(sorted(FLAGS), draw.randint(0, 4))
        return {"content": text, **{flag: draw.random() < 0.5 for flag in flags}}

    def names() -> dict[str, Any]:
        return {
            name: draw.choice(NAMES) for name in draw.sample([*NAMED_TOKENS, "x_token"], draw.randint(0, 4))
        }

    config: dict[str, Any] = names()
    if draw.random() < 0.4:
        config["additional_special_tokens"] = some()
    if draw.random() < 0.4:
        config["extra_special_tokens"] = some() if draw.random() < 0.5 else names()
    if draw.random() < 0.4:
        config["added_tokens_decoder"] = {
            str(draw.randint(0, 999)): {**entry(text), "special": draw.random() < 0.5} for text in some()
        }
    files: dict[str, Any] = {}
    if draw.random() < 0.5:
        files["special_tokens_map"] = names()
        if draw.random() < 0.5:
            files["special_tokens_map"]["additional_special_tokens"] = some()
    if draw.random() < 0.5:
        files["added_tokens"] = {text: draw.randint(256, 999) for text in some()}
    special = some()
    return write(path, special, [text for text in some() if text not in special], config, **files)


@pytest.mark.parametrize("seed", range(6))
def test_random_folders(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for number in range(25):
        check(random_folder(draw, tmp_path / str(number)))


def test_odd_entries_do_not_stop_a_start(tmp_path: Path) -> None:
    config = {
        "eos_token": 7,
        "bos_token": "",
        "pad_token": {"content": None},
        "additional_special_tokens": ["<a>", None, 3, {"content": "<b>"}],
        "added_tokens_decoder": {"x": {"content": "<tool>"}, "5": "<tool>", "6": None},
    }
    tokenizer = Tokenizer.load(write(tmp_path / "model", config=config, added_tokens={"<tool>": "x", "": 2}))
    assert tokenizer.special_tokens == {} and len(tokenizer.special_ids) == 2
    assert tokenizer.decode(tokenizer.encode("x<a><b>")) == "x"
