"""Flags on the fields of dataclasses: what bounds a value, and what Typer's options take from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.main
from model_tools import variant_folder
from test_vllm_environment import OF_THE_SERVER

from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.flags.options import Fields, with_options
from microvllm.ops.cpu import build
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.flag import (
    LOGS,
    MODEL,
    OPTIONS,
    Flag,
    check_flags,
    flag,
    flags_of,
    human_int,
    required_flag,
)
from microvllm.runtime.text.content_format import CONTENT_FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = required_flag(MODEL, "A model.")
    size: int = flag(1, OPTIONS, "A size.", name="the-size", low=1, read=human_int)
    share: float = flag(0.5, OPTIONS, "A share.", above=0, high=1)
    names: tuple[str, ...] = flag((), LOGS, "Names.")
    settings: Mapping[str, Any] = flag({}, LOGS, "Settings.")
    loud: bool = flag(False, LOGS, "Loud.", env=("TEST_LOUD",))
    short: bool = flag(False, LOGS, "Short.", spelled=("--short", "-s"))
    no_flag: int = 7


ALL = Fields()


def given(argv: list[str], fields: Fields = ALL) -> tuple[Args, int]:
    """What a command with the flags of `Args` and one of its own is called with."""
    found: list[tuple[Args, int]] = []
    app = typer.Typer()

    def command(args: Args, own: int = 3) -> None:
        found.append((args, own))

    command.__annotations__ |= {"args": Annotated[Args, fields], "own": int}
    app.command()(with_options(command))
    typer.main.get_command(app).main(argv, standalone_mode=False)
    return found[0]


def test_a_command_gets_an_instance_made_of_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(["--model", "m", "--own", "4"]) == (Args(model="m"), 4)
    argv = '--model m --the-size 2k --share 1 --names a --names b --settings {"a":1} --loud -s'.split()
    assert given(argv)[0] == Args(
        model="m", size=2000, share=1.0, names=("a", "b"), settings={"a": 1}, loud=True, short=True
    )
    monkeypatch.setenv("TEST_LOUD", "1")
    assert given([])[0] == Args(model=None, loud=True)
    assert given(["--no-loud"])[0].loud is False


@pytest.mark.parametrize("fields", [Fields(only=("model", "loud")), Fields(without=("size",))])
def test_a_command_may_leave_fields_out(fields: Fields) -> None:
    assert given(["--loud"], fields)[0] == Args(model=None, loud=True)
    with pytest.raises(typer.TyperException, match="--the-size"):
        given(["--the-size", "2"], fields)


@pytest.mark.parametrize(
    "argv", [["--the-size", "x"], ["--settings", "[]"], ["--no-short"], ["--share", "x"], ["--loud=x"]]
)
def test_what_cannot_be_read_is_named(argv: list[str]) -> None:
    with pytest.raises(typer.TyperException) as caught:
        given(argv)
    assert argv[0].partition("=")[0] in caught.value.format_message()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"size": 0}, "--the-size must be at least 1, got 0"),
        ({"share": 0.0}, "--share must be above 0 and at most 1, got 0.0"),
        ({"share": 1.5}, "--share must be above 0 and at most 1, got 1.5"),
        ({"share": float("nan")}, "--share must be above 0 and at most 1, got nan"),
        ({"names": ("a", "")}, "--names must not be empty"),
    ],
)
def test_a_value_out_of_bounds_is_named(values: dict[str, Any], problem: str) -> None:
    check_flags(Args(model="m"))
    with pytest.raises(ConfigError) as caught:
        check_flags(Args(model="m", **values))
    assert str(caught.value) == problem


def test_bounds() -> None:
    assert Flag(LOGS, "", low=1, high=3).problem(4) == "must be in [1, 3], got 4"
    assert Flag(LOGS, "", choices=("a", "b")).problem("c") == "must be one of a, b, got c"
    assert Flag(LOGS, "", low=1, choices=("auto",)).problem(0) == "must be at least 1, or auto, got 0"
    assert Flag(LOGS, "", low=0).problem(float("inf")) == "must be at least 0, got inf"
    assert Flag(LOGS, "", low=0).problem(None) is None and Flag(LOGS, "").problem(float("nan")) is None


@pytest.mark.parametrize("cls", [EngineArgs, ServerArgs])
def test_every_option_is_a_flag_with_a_default_within_its_bounds(cls: Any) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields - flags_of(cls).keys() == ({"dev_mode"} if cls is ServerArgs else set())
    check_flags(cls(**({"model": "m"} if cls is EngineArgs else {})))
    assert all(flag.help.endswith(".") for flag in flags_of(cls).values())


def test_names_that_stand_in_two_places_are_the_same() -> None:
    """The tables' own modules import too much for --help."""
    assert set(flags_of(ServerArgs)["chat_template_content_format"].choices) == set(CONTENT_FORMATS)
    read = {f"VLLM_{name}" for name in OF_THE_SERVER}
    env = {name for flag in flags_of(ServerArgs).values() for name in flag.env if name.startswith("VLLM_")}
    assert env == read - {"VLLM_SERVER_DEV_MODE"}


def test_keys_of_a_file_are_added_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("b\n")
    args = ServerArgs(api_keys=("a",), api_key_file=str(file))
    assert args.api_keys == dataclasses.replace(args, dev_mode=True).api_keys == ("a", "b")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is there and fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")


def test_options_are_resolved_without_compiling(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", pytest.fail)
    assert (
        EngineArgs(model=str(variant_folder("llama-tied")), device="cpu").resolve().attention_backend == "cpu"
    )


def test_torch_replaces_kernels_that_cannot_be_compiled(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(variant_folder("llama-tied"))
    told: list[tuple[Any, ...]] = []
    config = EngineArgs(model=model, device="cpu").prepare(lambda *words: told.append(words))
    assert config.attention_backend == "torch" and "Plain torch operators are used" in caplog.text
    assert told and {words[0] for words in told} == {"Compiling CPU kernels"}
    with pytest.raises(ConfigError, match="--attention-backend cpu: false failed") as caught:
        EngineArgs(model=model, device="cpu", attention_backend="cpu").prepare()
    assert "use --attention-backend torch" in str(caught.value.remedy)
