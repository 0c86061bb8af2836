#!/usr/bin/env python3
"""Compare the command line of `vllm serve` with that of `microvllm serve`, and print what differs.

    python scripts/compare_flags.py --vllm-python VLLM/bin/python
    python scripts/compare_flags.py --vllm-python VLLM/bin/python --list

The other interpreter builds vLLM's own parser; no model is loaded. Printed are flags and spellings that are
unknown here, flags that take another number of words, defaults that differ, flags that only one of both has,
and environment variables that only one of both knows. `--list` prints vLLM's flags by kind, as the tests have
them. Exit status: 0, or 1 if something of vLLM is unknown here or takes another number of words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from typing import Any

import typer.main

from microvllm import cli
from microvllm.openai_compat.flags.argv import normalise_argv
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options import vllm_flags
from microvllm.runtime.options.vllm_environment import VARIABLES

# Runs in vLLM's interpreter. Spellings that vLLM's help hides count, too.
DUMP = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
spellings = {}
for spelling, action in parser._option_string_actions.items():
    spellings.setdefault(id(action), []).append(spelling)
from vllm import envs
options = [
    {"spellings": spellings[id(action)], "nargs": action.nargs, "action": type(action).__name__,
     "default": str(action.default)}
    for action in parser._actions if action.option_strings and action.dest != "help"
]
variables = [name for name in envs.environment_variables if name.startswith("VLLM_")]
json.dump({"options": options, "variables": variables}, sys.stdout)
"""
# Differences that are meant.
KNOWN_DEFAULTS = {
    "host": "127.0.0.1 instead of every interface",
    "shutdown-timeout": "running requests may finish",
}


def read_vllm(python: str) -> tuple[list[dict[str, Any]], list[str]]:
    """vLLM's options (spellings, nargs, the class of the action, the default as text), and its variables."""
    result = subprocess.run([python, "-c", DUMP], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{python}: {result.stderr.strip().splitlines()[-1:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    return found["options"], found["variables"]


def kind_of(option: dict[str, Any]) -> str:
    if option["nargs"] == 0:
        return "switch"
    return {"+": "list", "?": "optional"}.get(option["nargs"] or "", "value")


def name_of(option: dict[str, Any]) -> str:
    long: str = next(each for each in option["spellings"] if each.startswith("--"))
    return long.removeprefix("--")


def print_list(options: list[dict[str, Any]]) -> None:
    kinds = defaultdict(list)
    for option in options:
        paired = option["nargs"] == 0 and option["action"] != "_StoreTrueAction"
        kinds["pair" if paired else kind_of(option)].append(name_of(option))
    for kind, names in kinds.items():
        print(f"{kind}: {' '.join(sorted(names))}")


def problem_of(spelling: str, kind: str, own: dict[str, str]) -> str | None:
    """What is wrong with a spelling of vLLM here; None if it is understood."""
    words = {"switch": [], "optional": [], "list": ["1", "2"]}.get(kind, ["1"])
    try:
        left = normalise_argv(["model", spelling, *words, "--ignore-unsupported-flags"], own, lambda _: None)
    except ConfigError as error:
        wrong = (
            str(error).startswith("unknown")
            or "takes no value" in str(error)
            or "needs a value" in str(error)
        )
        return str(error) if wrong else None
    strays = [word for word in left[1:] if not word.startswith("-")]
    return f"{spelling} leaves {' '.join(strays)} over" if strays else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True, help="the interpreter that has vLLM")
    parser.add_argument("--list", action="store_true", help="print vLLM's flags by kind, and end")
    arguments = parser.parse_args()
    options, variables = read_vllm(arguments.vllm_python)
    if arguments.list:
        print_list(options)
        return 0
    command: Any = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    own = command.flag_kinds()
    params = {each: param for param in command.params for each in (*param.opts, *param.secondary_opts)}
    names = {name_of(option) for option in options}
    problems = [
        problem
        for option in options
        for spelling in option["spellings"]
        if (problem := problem_of(spelling, kind_of(option), own)) is not None
    ]
    for problem in problems:
        print(f"unknown here: {problem}")
    for option in options:
        name = name_of(option)
        param = params.get(f"--{name}")
        # vLLM's empty objects and lists are None here, and what both decide later is None in both.
        if param is None or param.multiple or name in KNOWN_DEFAULTS or name == "model":
            continue
        if option["default"] == "==SUPPRESS==" or option["default"].endswith(")"):  # none, or a whole config
            continue
        ours = str(param.default)
        if ours != option["default"] and not {ours, option["default"]} <= {
            "None",
            "",
            "{}",
            "[]",
            "0",
            "0.0",
        }:
            print(f"default: --{name} is {ours} here, {option['default']} in vLLM")
    spellings = {each for option in options for each in option["spellings"]}
    extra = sorted(
        flag for flag, param in params.items() if not spellings & {*param.opts, *param.secondary_opts}
    )
    print(f"only here: {' '.join(extra)}")
    print(f"only in older vLLM: {' '.join(sorted(vllm_flags.KINDS.keys() - names))}")
    counts = {"honoured": 0, "ignored with a line": 0, "refused": 0}
    for name in names:
        kind = "refused" if name in vllm_flags.REFUSED else "ignored with a line"
        counts["honoured" if f"--{name}" in own else kind] += 1
    print(f"{len(names)} options of vLLM: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    for name in sorted(VARIABLES.keys() ^ set(variables)):
        print(f"environment: {name} is {'not known here' if name in variables else 'none of vLLM'}")
    return 1 if problems or VARIABLES.keys() != set(variables) else 0


if __name__ == "__main__":
    sys.exit(main())
