"""The scripted model of `scripts/clients`: which turns it plays, and that what it writes is what is asked."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from model_tools import ROOT, load_script

from microvllm.runtime.process import spawn
from microvllm.runtime.text.chat_template import ChatTemplate, normalize_messages

FOLDER = ROOT / "scripts" / "clients"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return load_script("clients/scripted")


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return load_script("clients/check")


def tool(name: str, **members: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": members, "required": list(members)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def turns(scripted: ModuleType, *tools: dict[str, Any], thinking: bool = False) -> list[Any]:
    """What the model calls, turn by turn, each answered with "fine", and what it says in the end."""
    template = ChatTemplate(scripted.TEMPLATE.read_text(), {})
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Change it."}]
    found: list[Any] = []
    while True:
        prompt = template.render(normalize_messages(messages), tools=list(tools), enable_thinking=thinking)
        text = scripted.answer(prompt, None, "/project")
        assert thinking == ("</think>" in text)
        call = re.search(r"<tool_call>\n(.*)\n</tool_call>", text)
        if call is None:
            return [*found, text.rpartition("\n")[2]]
        function = json.loads(call[1])
        found.append((function["name"], function["arguments"]))
        messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": function}]})
        messages.append({"role": "tool", "content": "fine"})


STRING = {"type": "string"}


@pytest.mark.parametrize("thinking", [False, True])
def test_a_coding_agent_reads_and_edits(scripted: ModuleType, thinking: bool) -> None:
    path, edit = "/project/colors.txt", {"file_path": STRING, "old_string": STRING, "new_string": STRING}
    tools = (tool("Bash", command=STRING), tool("Edit", **edit), tool("Read", file_path=STRING))
    assert turns(scripted, *tools, thinking=thinking) == [
        ("Read", {"file_path": path}),
        ("Edit", {"file_path": path, "old_string": "red", "new_string": "blue"}),
        "The tool returned: fine",
    ]


def test_an_agent_with_a_shell_only_ends_by_a_command(scripted: ModuleType) -> None:
    first, last, _ = turns(scripted, tool("bash", command=STRING))
    assert first == ("bash", {"command": "sed -i s/red/blue/ /project/colors.txt"})
    assert last == ("bash", {"command": scripted.FINISH})


def test_a_library_gets_its_tool_called_and_its_answer_given(scripted: ModuleType) -> None:
    tools = (tool("final_answer", answer=STRING), tool("get_weather", city=STRING))
    assert turns(scripted, *tools) == [
        ("get_weather", {"city": "city"}),
        ("final_answer", {"answer": "answer"}),
        "The tool returned: fine",
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"name": STRING, "age": {"type": "integer"}}, "required": ["name"]},
        {"type": "array", "items": {"enum": ["a"]}, "minItems": 3},
        {"$ref": "#/$defs/P", "$defs": {"P": {"anyOf": [{"type": "null"}, STRING]}}},
        {"type": "string", "minLength": 3, "maxLength": 4},
        {"type": ["number", "null"], "minimum": 7},
        {"const": {"a": 1}},
    ],
)
def test_values_fit_their_schemas(scripted: ModuleType, schema: dict[str, Any]) -> None:
    jsonschema.validate(scripted.instance(schema, schema, "", "x"), schema)


def test_every_program_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    libraries = load_script("clients/libraries").LIBRARIES
    files = {path.name for path in (FOLDER / "programs").iterdir() if path.is_file()}
    assert files == {library.program for library in libraries.values()} | {"common.py"}


def test_only_the_engine_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server has other processes of its own, which render templates and check grammars."""
    script = tmp_path / "{engine}.py"
    script.write_text("import os, sys\nos.write(int(sys.argv[2]), repr(sys.argv[3:]).encode())\n")
    monkeypatch.setattr(spawn, "start_module", spawn.start_module)
    load_script("replaced_engine").replace_engine(script, "a{b}")
    process, ours = spawn.start_module("microvllm.runtime.process.engine_main")
    with ours:
        assert (ours.recv(99), process.wait()) == (b"['a{b}']", 0)
    process, ours = spawn.start_module("platform")  # whose `main` does not exist in every version
    ours.close()
    assert "runpy" not in process.args[2] and "platform" in process.args[2]  # type: ignore[index]
    process.kill()
    process.wait()


def test_the_documentation_gets_what_was_found(clients: ModuleType) -> None:
    docs = (ROOT / "docs" / "agents.md").read_text()
    names = [*clients.LIBRARIES, *clients.AGENTS]
    rows = {name: (f"7.{index}.1", f"result {index}") for index, name in enumerate(names)}
    text = clients.documented(docs, rows, "1 May 2030", "abc1234")
    for index, name in enumerate(names):
        assert f"\n| {name} | 7.{index}.1 | result {index} |\n" in text
        if name in clients.AGENTS:
            assert f"\n## {clients.AGENTS[name].title}7.{index})\n" in text
    assert "printed this on 1 May 2030, at commit abc1234, in front of" in text
    assert clients.documented(text, rows, "1 May 2030", "abc1234") == text
