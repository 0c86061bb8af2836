"""Serves with `microvllm serve`, but for the engine's process, which runs a script instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def replace_engine(script: Path, *options: str) -> None:
    """Let engine processes run `script engine FD *options`; all other processes are themselves."""
    from microvllm.runtime.process import spawn

    start_module = spawn.start_module
    folder, file = str(script.parent), str(script)
    code = (
        f"import runpy, sys\nsys.argv = ['', 'engine', sys.argv[1], *{list(options)!r}]\n"
        f"sys.path.insert(0, {folder!r})\nrunpy.run_path({file!r}, run_name='__main__')\n"
    )

    def start(module: str, *arguments: str, **others: Any) -> Any:
        if not module.endswith("engine_main"):
            return start_module(module, *arguments, **others)
        own = spawn.CODE
        spawn.CODE = code.replace("{", "{{").replace("}", "}}")  # `start_module` formats it
        try:
            return start_module(module, *arguments, **others)
        finally:
            spawn.CODE = own

    spawn.start_module = start


def serve(*arguments: str) -> None:
    """Run `microvllm serve` with these arguments."""
    from microvllm.cli import main

    sys.argv = ["microvllm", "serve", *arguments]
    main()
