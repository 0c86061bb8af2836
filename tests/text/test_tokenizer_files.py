"""The folder that `/v1/models` names as `root`: transformers loads from it the tokenizer that is served."""

from __future__ import annotations

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_client import fresh
from http_tools import in_process
from model_tools import variant_folder
from qwen1_model import write_folder

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.find_model import DEMO_MODEL, find_model
from microvllm.runtime.text import tokenizer_files
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.text.tokenizer_files import loadable_path

TEXTS = ["Hello, world!", "  two  spaces\n\n\ttab", "naïve 你好 😀", "<|im_start|>user\nHi<|im_end|>\n", ""]
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(kind: str, tmp_path: Path) -> Path:
    return find_model(DEMO_MODEL) if kind == "gguf" else write_folder(tmp_path / "qwen")


@pytest.mark.parametrize("kind", ["gguf", "tiktoken"])
def test_transformers_loads_the_same_tokenizer(kind: str, tmp_path: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    path = source(kind, tmp_path)
    ours = Tokenizer.load(path)
    root = loadable_path(ours, path, 2048)
    assert Path(root).parent == cache / "microvllm" / "tokenizers"
    theirs = AutoTokenizer.from_pretrained(root)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_token_id and theirs.model_max_length == 2048
    assert theirs.chat_template == ours.chat_template
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True).count("Hi") == 1


def test_a_folder_that_transformers_reads_is_its_own_root(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant_folder("llama-tied")
    link = tmp_path / "model"
    link.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert loadable_path(Tokenizer.load(folder), Path("model"), 64) == str(link)
    assert not cache.exists()


def test_the_files_are_written_once_and_anew_for_another_file(tmp_path: Path, cache: Path) -> None:
    path = source("tiktoken", tmp_path)
    tokenizer = Tokenizer.load(path)
    with ThreadPoolExecutor(8) as threads:
        roots = list(threads.map(lambda _: loadable_path(tokenizer, path, 64), range(8)))
    root = Path(roots[0])
    assert set(roots) == {str(root)} and [root] == list(root.parent.iterdir())
    before = (root / "tokenizer.json").stat().st_mtime_ns
    assert loadable_path(tokenizer, path, 64) == str(root)
    assert (root / "tokenizer.json").stat().st_mtime_ns == before
    os.utime(path / "qwen.tiktoken", ns=(1, 1))
    assert loadable_path(tokenizer, path, 64) != str(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = source("tiktoken", tmp_path)
    tokenizer = Tokenizer.load(path)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tokenizer_files, "write_tokenizer", fail)
    assert loadable_path(tokenizer, path, 64) == str(path)
    assert "Read-only file system" in caplog.text
    assert list((cache / "microvllm" / "tokenizers").iterdir()) == []
    monkeypatch.setattr(tokenizer_files, "cache_folders", fail)
    assert loadable_path(tokenizer, path, 64) == str(path)


def test_a_full_folder_is_passed_over(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = source("tiktoken", tmp_path)
    full, other = tmp_path / "full", tmp_path / "other"
    full.touch()  # nothing can be made below it
    other.mkdir()
    monkeypatch.setattr(tokenizer_files, "cache_folders", lambda: iter((full, other)))
    assert Path(loadable_path(Tokenizer.load(path), path, 64)).is_relative_to(other) and not caplog.records


async def test_root_is_a_name_of_the_model() -> None:
    client = fresh()
    async with in_process(client) as http:
        root = (await http.get("/v1/models")).json()["data"][0]["root"]
        assert root == client.tokenizer_root
        reply = await http.post("/tokenize", json={"model": root, "prompt": "Hi"})
        assert reply.status_code == 200
        tokens = {"model": root, "tokens": reply.json()["tokens"]}
        assert (await http.post("/detokenize", json=tokens)).status_code == 200
        assert (await http.post("/tokenize", json={"model": "/x", "prompt": "Hi"})).status_code == 404
        body = {"model": root, "prompt": "Hi"}
        answer = (await http.post("/v1/completions", json=body)).json()
        assert answer["model"] == "fake-model"


def test_the_demo_model_has_the_sampling_of_its_card(tmp_path: Path) -> None:
    demo = EngineArgs(model=DEMO_MODEL, device="cpu")
    assert demo.resolve().generation_defaults == {"temperature": 0.2, "top_p": 0.9}
    own = EngineArgs(model=DEMO_MODEL, device="cpu", override_generation_config={"temperature": 0.7})
    assert own.resolve().generation_defaults == {"temperature": 0.7, "top_p": 0.9}
    removed = EngineArgs(model=DEMO_MODEL, device="cpu", override_generation_config={"temperature": None})
    assert removed.resolve().generation_defaults == {"top_p": 0.9}  # as in vLLM
    for args in (
        EngineArgs(model=DEMO_MODEL, device="cpu", generation_config="vllm"),
        EngineArgs(model=str(find_model(DEMO_MODEL)), device="cpu"),
    ):
        assert args.resolve().generation_defaults == {}
    defaults = {"top_k": 3, "presence_penalty": 1.5, "frequency_penalty": 0.5, "skip_special_tokens": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    folder = EngineArgs(model=DEMO_MODEL, device="cpu", generation_config=str(tmp_path))
    assert folder.resolve().generation_defaults == defaults


@pytest.mark.parametrize("name", ["top_p", "eos_token_id", "temperature"])
@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"\ud800": 1}, [True, "2"]])
def test_a_generation_config_of_no_numbers_names_the_key(tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({name: value}))  # a lone surrogate is spelled as JSON spells it
    args = EngineArgs(model=DEMO_MODEL, device="cpu", generation_config=str(tmp_path))
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}: {name} must be"):
        args.resolve()
