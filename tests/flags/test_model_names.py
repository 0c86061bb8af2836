"""A model by its name on the Hugging Face hub: found in the cache of `hf download`, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from model_tools import variant_folder

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.find_model import find_model

NAME, FIRST, SECOND = "Someone/A-Model.1", "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions as `hf download` lays them out: files are links to the blobs beside them."""
    folder = tmp_path / "hub" / "models--Someone--A-Model.1"
    shutil.copytree(variant_folder("llama-tied"), folder / "blobs")
    for commit in (FIRST, SECOND):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for blob in (folder / "blobs").iterdir():
            (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs" / "pr").mkdir(parents=True)
    (folder / "refs" / "main").write_text(SECOND, "utf-8")
    (folder / "refs" / "pr" / "1").write_text(FIRST, "utf-8")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, SECOND), ("main", SECOND), ("pr/1", FIRST), (FIRST, FIRST), (SECOND, SECOND)],
)
def test_a_downloaded_model_is_found_by_its_name(cache: Path, revision: str | None, commit: str) -> None:
    assert find_model(NAME, revision=revision) == cache / "snapshots" / commit


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"])
def test_the_cache_is_where_the_variables_say(
    cache: Path, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    if variable == "XDG_CACHE_HOME":
        (tmp_path / "huggingface").symlink_to(tmp_path)
    monkeypatch.setenv(variable, str(tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / "hub"))
    assert find_model(NAME).resolve() == cache / "snapshots" / SECOND


def test_the_cache_is_where_download_dir_says(cache: Path, tmp_path: Path) -> None:
    elsewhere = cache.parent.rename(tmp_path / "elsewhere")
    path = str(elsewhere / cache.name / "snapshots" / SECOND)
    args = EngineArgs(model=NAME, tokenizer=NAME, download_dir=str(elsewhere), device="cpu")
    config = args.resolve()
    assert (config.model_path, config.tokenizer_path) == (path, path)
    args.model = "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match=f"not in the cache {elsewhere} either") as raised:
        args.resolve()
    assert f"`hf download Qwen/Qwen3-0.6B --cache-dir {elsewhere}`" in raised.value.remedy


def test_an_engine_takes_model_and_tokenizer_in_their_revisions(cache: Path) -> None:
    config = EngineArgs(model=NAME, revision="pr/1", device="cpu").resolve()
    assert config.model == NAME
    assert config.model_path == config.tokenizer_path == str(cache / "snapshots" / FIRST)
    config = EngineArgs(model=NAME, tokenizer_revision=FIRST, device="cpu").resolve()
    assert (config.model_path, config.tokenizer_path) == (
        str(cache / "snapshots" / SECOND),
        str(cache / "snapshots" / FIRST),
    )


@pytest.mark.parametrize(
    "revision", ["v2", "../../..", "..", ".", "../blobs", "/etc", "x" * 5000, "nul\0byte"]
)
def test_a_revision_that_is_not_there_is_refused(cache: Path, revision: str) -> None:
    with pytest.raises(ConfigError, match=r"revision|Someone/A-Model\.1"):
        find_model(NAME, revision=revision)


def test_what_is_missing_is_said_with_the_command_that_brings_it(cache: Path) -> None:
    with pytest.raises(ConfigError, match=f"not in the cache {cache.parent} either") as raised:
        find_model("Qwen/Qwen3-0.6B", revision="v1")
    assert "`hf download Qwen/Qwen3-0.6B --revision v1`" in raised.value.remedy
    with pytest.raises(ConfigError, match="not as revision v2") as raised:
        find_model(NAME, revision="v2")
    assert FIRST in raised.value.remedy


def test_a_folder_of_that_name_goes_first_and_has_no_revisions(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    assert find_model(NAME) == Path(NAME) and not caplog.records
    assert find_model(NAME, revision="main") == Path(NAME)
    assert "--revision main has no effect" in caplog.text


@pytest.mark.parametrize(
    "name", ["models/x.gguf", "../Someone", "a/../b", "./x", "a/b/c", "-a/b", "a--b/c", "a/b\n"]
)
def test_other_texts_are_no_names_of_the_hub(cache: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder or \.gguf file\nmodels"):
        find_model(name)


def test_the_cache_may_be_named_by_a_variable_or_by_a_user_that_does_not_exist(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOM", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "$ROOM")
    assert find_model(NAME) == cache / "snapshots" / SECOND
    monkeypatch.setenv("HF_HOME", "~no-such-user/x")
    with pytest.raises(ConfigError, match="home directory"):
        find_model(NAME)


def test_a_download_that_was_cut_off_is_to_be_repeated(cache: Path) -> None:
    (cache / "blobs" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json") as raised:
        find_model(NAME)
    assert f"hf download {NAME}" in raised.value.remedy
    assert find_model(NAME, "--tokenizer") == cache / "snapshots" / SECOND
