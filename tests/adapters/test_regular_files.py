"""Files of a model's folder that are none, are nested without end, or have ids out of all proportion."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.safetensors_file import open_folder
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.text.tokenizer import MIN_ID_LIMIT, Tokenizer

JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"),
)
OTHERS = ("model.safetensors", "chat_template.jinja", "additional_chat_templates/tools.jinja")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("models") / "whole", "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(folder: Path) -> None:
    """Reads everything that a start reads."""
    try:
        EngineArgs(model=str(folder)).resolve()
        Tokenizer.load(folder)
        open_folder(folder)
    except ModelFileError as error:
        raise ConfigError(str(error)) from error


def test_the_folder_itself_loads(folder: Path) -> None:
    load(folder)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("name", [*JSON_FILES, *OTHERS])
def test_what_is_no_file_is_named(
    folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            monkeypatch.chdir(path.parent)  # a socket's path may have a hundred characters
            listening.bind(path.name)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert str(caught.value) == f"{path}: is not a regular file"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "[" * 99_999 + "]" * 99_999 + "}"]
)
@pytest.mark.parametrize("name", JSON_FILES)
def test_deep_nesting_is_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder / name) in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("token_id", [MIN_ID_LIMIT, 2 * 10**8, 2**32 - 1, 2**40, -1])
def test_ids_out_of_proportion_are_named(folder: Path, token_id: int) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["far away"] = token_id
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(folder)
    message = str(caught.value)
    assert str(file) in message and str(token_id) in message and "\n" not in message


def test_ids_with_gaps_are_taken(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["far away"] = MIN_ID_LIMIT - 1
    file.write_text(json.dumps(content))
    assert Tokenizer.load(folder).vocab_size == MIN_ID_LIMIT


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_gguf_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ModelFileError, match="is not a regular file"):
        GGUFFile(path)


def test_nested_gguf_metadata_is_one_line(tmp_path: Path) -> None:
    """An array of arrays of arrays: each of its levels is a type (9) and a count (1)."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    level = number(9, 4) + number(1, 8)
    key = number(1, 8) + b"k" + number(9, 4)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + number(3, 4) + number(0, 8) + number(1, 8) + key + level * 100_000)
    with pytest.raises(ModelFileError, match="array of arrays"):
        GGUFFile(path)
