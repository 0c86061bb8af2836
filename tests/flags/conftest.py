"""Commands that are built once, and what serve was about to start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import typer.main
from cli_case import get_command

from microvllm.openai_compat import server
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process import spawn


@pytest.fixture(scope="module", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer makes the commands anew out of the signatures for each `cli.run`, which is most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", get_command)
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[EngineArgs, ServerArgs]]]:
    """Collects what `serve` was about to start, in place of starting it."""
    calls: list[tuple[EngineArgs, ServerArgs]] = []
    for name in ("MICROVLLM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spawn, "SpawnedEngine", lambda cpu_threads: contextlib.nullcontext())
    monkeypatch.setattr(server, "serve", lambda config, args, **_: calls.append((config, args)))
    yield calls
