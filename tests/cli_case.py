"""Commands that fail, and the flags of serve as Typer knows them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import typer.main

from microvllm import cli

DEMO = "smollm2-135m-instruct"
get_command = functools.cache(typer.main.get_command)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail with status 2 and two lines, cause and remedy; the cause is returned."""
    assert cli.run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("microvllm: warning: ")]
    assert len(lines) == 2 and lines[0].startswith("microvllm: error: "), err
    assert lines[1].startswith("microvllm: hint: ") and len(lines[1]) < 400, err
    return lines[0]


@functools.cache
def own_flags() -> dict[str, str]:
    """Flag -> parameter name of `serve`."""
    command = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return {
        name: param.name
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--") and name != "--help"
    }


def command_param(flag: str) -> Any:
    """The option of `serve` that a flag belongs to."""
    command = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return next(param for param in command.params if flag in (*param.opts, *param.secondary_opts))
