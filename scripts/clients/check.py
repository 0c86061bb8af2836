#!/usr/bin/env python3
"""Run client libraries and coding agents, unmodified, against a live server: one table.

    python scripts/clients/check.py                            # all of them, against the scripted model
    python scripts/clients/check.py anthropic langchain codex  # some
    python scripts/clients/check.py --url http://127.0.0.1:8000 --model NAME   # a running server
    python scripts/clients/check.py --docs                     # and write what was found into docs/agents.md

Each is installed from PyPI or npm into an environment of its own below --folder (once; all of them take
gigabytes). A library runs its program of `programs/`: structured output, which has to fit its schema, and a
loop with a tool, which has to end with the tool's result. An agent gets a folder with a file, has to change
it, and to finish. The scripted model (`scripted.py`) plays the turns behind the real server. Against another
model only the libraries are tried, and the text of the loop is only shown. Exit status 1 if one failed; the
end of its output is then shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coding_agents import AGENTS, TASK, Agent
from libraries import LIBRARIES, Library
from scripted import FILE, MODEL, NEW, OLD

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from environments import free_port, install, run  # noqa: E402

START_TIMEOUT_S = 300.0
# Newest versions want a newer Node.js than distributions have, for which npm would take older versions.
NODE = ("node@24",)
RESULT = "sunny in city"  # of the tool, with the arguments that the scripted model makes up


# ---- the server -------------------------------------------------------------------------------------


@contextlib.contextmanager
def scripted_server(folder: Path) -> Iterator[str]:
    """A server with the scripted model, whose agents work in `folder`; yields its address."""
    port = free_port()
    with (folder.parent / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "scripted.py"), "--port", str(port)],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_ready(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(START_TIMEOUT_S)


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the server did not start")
        time.sleep(0.1)


# ---- checks -----------------------------------------------------------------------------------------


def check_library(library: Library, programs: Path, url: str, model: str, path: dict[str, str]) -> str:
    """Return what a library's program found, for the table. Raises `RuntimeError` if that is wrong."""
    arguments = [url, model, str(free_port())]
    with tempfile.TemporaryDirectory() as folder:
        if library.npm:
            # A module is resolved from where its file is.
            program = programs.parent.parent / library.program
            shutil.copy(HERE / "programs" / library.program, program)
            command = ["node", str(program), *arguments]
        else:
            command = [str(programs / "python"), str(HERE / "programs" / library.program), *arguments]
        output = run(command, Path(folder), {"HOME": folder, "OPENAI_API_KEY": "none", **path})
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    person = found["structured"]
    if not isinstance(person.get("name"), str) or type(person.get("age")) is not int:
        raise RuntimeError(f"{person} does not fit the schema")
    if "tools" not in found:
        return "structured"
    if model == MODEL and RESULT not in f"{found['tools']}{found.get('result', '')}":
        raise RuntimeError(f"the loop ended with {found['tools']!r}")
    return "structured, tools" if model == MODEL else f"structured, tools: {found['tools']!r:.60}"


def check_agent(agent: Agent, programs: Path, work: Path, homes: Path, url: str, path: dict[str, str]) -> str:
    """Let an agent change the file. Raises `RuntimeError` unless it did, and ended by itself."""
    (work / FILE).write_text(f"my colour is {OLD}\n")
    with tempfile.TemporaryDirectory(dir=homes) as home:  # Codex wants it outside of /tmp
        for name, text in agent.files(url).items():
            (Path(home) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(home) / name).write_text(text)
        environment = {"HOME": home, "XDG_CONFIG_HOME": f"{home}/.config", **agent.environment(url), **path}
        program, *arguments = agent.command
        words = [word.format(home=home, url=url, model=MODEL, task=TASK) for word in arguments]
        output = run([str(programs / program), *words], work, environment)
    text = (work / FILE).read_text()
    if text != f"my colour is {NEW}\n":
        raise RuntimeError(f"the file holds {text!r}; {output[-2000:]}")
    return "file changed, finished"


# ---- the documentation ------------------------------------------------------------------------------


def documented(text: str, rows: Mapping[str, tuple[str, str]], day: str, commit: str) -> str:
    """Return docs/agents.md with other rows (version and result, by client), day, commit and versions."""
    for name, (version, result) in rows.items():
        text, found = re.subn(rf"(?m)^\| {name} \|.*$", f"| {name} | {version} | {result} |", text)
        if found != 1:
            raise ValueError(f"docs/agents.md has {found} rows of {name}")
        if name in AGENTS:
            short = ".".join(version.split(".")[:2])
            heading = re.escape(f"## {AGENTS[name].title}")
            text = re.sub(rf"(?m)^({heading})[0-9.]+\)", rf"\g<1>{short})", text)
    return re.sub(
        r"printed this on [^,]+, at commit \w+,", f"printed this on {day}, at commit {commit},", text
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*LIBRARIES, *AGENTS])}; default: all")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "microvllm-clients")
    parser.add_argument("--url", help="a running server, in place of one with the scripted model")
    parser.add_argument("--model", default=MODEL, help="the name that the running server serves")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/agents.md")
    args = parser.parse_args()
    if args.docs and (args.url or args.names):
        parser.error("--docs is for a run of all clients against the scripted model")
    known = {**LIBRARIES, **({} if args.url else AGENTS)}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    folder = args.folder.resolve()
    commit = run(["git", "rev-parse", "--short", "HEAD"], HERE, {}).strip() if args.docs else ""
    failed = 0
    rows: dict[str, tuple[str, str]] = {}
    print("| client | version | result | seconds |\n|---|---|---|---|", flush=True)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "work"
        work.mkdir()
        url = args.url or stack.enter_context(scripted_server(work))
        for name in args.names or known:
            client, version, start, problem = known[name], "", time.monotonic(), ""
            try:
                path = {}
                if client.npm:
                    node, _ = install("node", NODE, npm=True, folder=folder)
                    path["PATH"] = f"{node}{os.pathsep}{os.environ['PATH']}"
                programs, version = install(name, client.packages, client.npm, folder)
                start = time.monotonic()
                if isinstance(client, Library):
                    result = check_library(client, programs, url, args.model, path)
                else:
                    result = check_agent(client, programs, work, folder, url, path)
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                problem = f"{type(error).__name__}: {error}"
                result = "FAILED"
                failed += 1
            print(f"| {name} | {version} | {result} | {time.monotonic() - start:.0f} |", flush=True)
            rows[name] = version, result
            if problem:
                print(f"{name}: {problem}", file=sys.stderr, flush=True)
    if args.docs:
        day = time.strftime("%d %B %Y").lstrip("0")
        docs = HERE.parent.parent / "docs" / "agents.md"
        docs.write_text(documented(docs.read_text(), rows, day, commit))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
