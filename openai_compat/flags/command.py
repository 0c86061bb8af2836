"""Reads a command's flags as `vllm serve` does, groups its help, and finds the remedy for an error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from microvllm.openai_compat.flags.argv import IGNORE_FLAG, UsageError, normalise_argv
from microvllm.runtime.errors import EngineError
from microvllm.runtime.options.flag import OBJECT, OPTIONS, SECTIONS
from microvllm.runtime.options.vllm_environment import ignored_variables

PROGRAM = "microvllm"
HELP_FLAG = "--help="


class Command(TyperCommand):
    """A Typer command that reads its flags the way `vllm serve` does."""

    def flag_kinds(self) -> dict[str, str]:
        """Return each flag of the command with its kind, as `normalise_argv` takes them."""
        kinds = {"--help": "switch", "-h": "switch"}
        for param in self.params:
            kind = "list" if getattr(param, "multiple", False) else "value"
            if getattr(param, "is_flag", False):
                kind = "switch"
            elif param.metavar == OBJECT:
                kind = "json"
            kinds |= {name: kind for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
        return kinds

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        kinds = self.flag_kinds()
        ctx.meta[HELP_FLAG] = next(
            (word[len(HELP_FLAG) :] for word in args if word.startswith(HELP_FLAG)), ""
        )
        words = normalise_argv(args, kinds, warn)
        if IGNORE_FLAG in kinds and (problem := ignored_variables(os.environ)):
            warn(problem)
        return super().parse_args(ctx, words)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in sections, after `--help=WORD` those whose section or flag has the word in it.

        Typer's own sections need rich, which cuts long flags short in 80 columns.
        """
        word = ctx.meta.get(HELP_FLAG, "all").lower().replace("_", "-").removeprefix("--")
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *SECTIONS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                title = "Arguments" if argument else getattr(param, "rich_help_panel", None) or OPTIONS
                if argument:  # without its type
                    record = record[0].partition(" ")[0], record[1]
                if word == "all" or word in title.lower() or word in record[0].lower():
                    sections[title].append(record)
        if not any(sections.values()):
            problem = f"{HELP_FLAG}{word}: no flag and no section has that in its name"
            raise UsageError(problem, remedy=f"the sections are {', '.join(SECTIONS)}")
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def warn(message: str) -> None:
    """Print one warning line on stderr."""
    with contextlib.suppress(OSError):  # a full disk
        print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


class LogHandler(logging.StreamHandler[Any]):
    """Writes records to stderr in the form of the command line's own lines.

    What the options come to is written once, although they are resolved before torch is imported and behind.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._written: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "microvllm.config":
            if (text := record.getMessage()) in self._written:
                return
            self._written.add(text)
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{PROGRAM}: {level}{super().format(record)}"


def report_error(message: str, remedy: str) -> None:
    """Print the cause of an error and what to do about it, a line each, on stderr."""
    for kind, text in (("error", message), ("hint", remedy)):
        with contextlib.suppress(OSError):
            print(f"{PROGRAM}: {kind}: {' '.join(text.split())}", file=sys.stderr)


def remedy_for(error: Exception, message: str, root: Any, argv: Sequence[str]) -> str:
    """Return one line that says what to do about an error.

    It is the error's own remedy, else the help of the first flag in its `message` that the command has.
    """
    own: str | None = getattr(error, "remedy", None)
    if own is not None:
        return own
    if isinstance(error, EngineError):
        return f"the lines above may say why; `{PROGRAM} collect-env` prints what a bug report needs"
    command: Any = root
    path = PROGRAM
    for word in argv:
        if word not in getattr(command, "commands", {}):
            break
        command, path = command.commands[word], f"{path} {word}"
    more = f"`{path} --help` lists all there is"
    flags = {flag: param for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    for flag in re.findall(r"--[a-z][a-z0-9-]*", message):
        param = flags.get(flag)
        text, variables = getattr(param, "help", None), getattr(param, "envvar", None)
        if text:
            named = [variables] if isinstance(variables, str) else variables or []
            origin = "".join(f", or {name} in the environment" for name in named if os.environ.get(name))
            return f"{flag}{origin}: {text.rstrip('.')}; {more}"
    return more
