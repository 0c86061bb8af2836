#!/usr/bin/env python3
"""Serve a model that plays written turns: programs that need a capable model can be tried without one.

    python scripts/clients/scripted.py --port 8000 [flags of `microvllm serve`]

The server is the real one (HTTP, chat template, tokenizer, parsers, channel); only the engine process is
replaced. It reads the prompt back as text and answers by what that offers:

* A constraint: the smallest value of the JSON schema, or the first of the choices.
* A tool, and no result of it yet: it calls the tool, with arguments made of the tool's own schema. Of several
  tools it calls what reads a file, then what edits it: a coding agent changes `colors.txt` from red to blue.
* Otherwise it says what the last tool returned, or repeats the user's last words.

With thinking turned on, a sentence of reasoning comes first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from replaced_engine import replace_engine, serve

MODEL, CONTEXT = "scripted", 131072
TEMPLATE = Path(__file__).with_name("conversation.jinja")
FILE, OLD, NEW = "colors.txt", "red", "blue"
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?=<\|im_end\|>|<\|im_start\|>|\Z)", re.DOTALL)
TOOLS = re.compile(r"<tools>\n(.*?)</tools>", re.DOTALL)
RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
OBSERVATION = re.compile(r"\nObservation:\n(.*?)<\|im_end\|>", re.DOTALL)  # as smolagents gives results back
FLAGS = (
    *("--served-model-name", MODEL, "--chat-template", str(TEMPLATE)),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    # As long a context as the agents expect; nothing is computed.
    *("--max-model-len", str(CONTEXT)),
    *("--num-gpu-blocks-override", "8192", "--max-stop-strings", "16"),
)
# What a coding agent's tools are called, in the order in which they are used, lower case.
READERS = ("read", "read_file", "readfile")
EDITORS = (
    "edit",
    "edit_file",
    "replace",
    "single_find_and_replace",
    "write",
    "bash",
    "shell",
    "exec_command",
)
FINISH = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"  # of an agent that has a shell only
ANSWERS = ("final_answer", "final_result")  # tools by which a library has the model end


# ---- the model --------------------------------------------------------------------------------------


def answer(prompt: str, constraint: Any, folder: str) -> str:
    """Return what the model says after this prompt; `folder` is where the agent's file is."""
    found = TOOLS.search(prompt)
    tools = {} if found is None else tools_of(found[1])
    turns = TURN.findall(prompt)
    results = RESULT.findall(prompt) or OBSERVATION.findall(prompt)
    text = ""
    if prompt.endswith("<think>\n"):
        text = f"I have {len(tools)} tools and {len(results)} results.\n</think>\n\n"
    call = next_call(tools, len(results), folder)
    if call is not None:
        name, arguments = call
        body = json.dumps({"name": name, "arguments": arguments})
        return f"{text}I call {name}.\n<tool_call>\n{body}\n</tool_call>"
    if constraint is not None and not tools:
        return text + constrained(constraint)
    if results:
        return f"{text}The tool returned: {results[-1]}"
    said = [content for role, content in turns if role == "user"]
    return f"{text}You said: {said[-1] if said else ''}"


def tools_of(lines: str) -> dict[str, dict[str, Any]]:
    """Return the schemas of the tools' arguments by their names."""
    functions = [json.loads(line)["function"] for line in lines.splitlines() if line]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def next_call(tools: Mapping[str, Any], done: int, folder: str) -> tuple[str, Any] | None:
    """Return the call that follows `done` results, or None if nothing is left to do."""
    by_lower = {name.lower(): name for name in tools}
    reader, editor = (
        next((by_lower[name] for name in names if name in by_lower), None) for names in (READERS, EDITORS)
    )
    if editor is not None:
        plan = [editor, editor] if len(tools) == 1 else [name for name in (reader, editor) if name]
    else:
        plan = [name for name in tools if name not in ANSWERS][:1]
        plan += [name for name in tools if name in ANSWERS]
    if done >= len(plan):
        return None
    name = plan[done]
    arguments = instance(tools[name], tools[name], folder)
    if len(tools) == 1 and editor is not None and done == 1:
        arguments["command"] = FINISH
    return name, arguments


def constrained(constraint: Any) -> str:
    """Return a text that a `StructuredOutput` allows."""
    if constraint.kind == "json":
        schema = json.loads(constraint.spec)
        return json.dumps(instance(schema, schema, ""))
    if constraint.kind == "json_object":
        return "{}"
    if constraint.kind == "choice":
        return str(json.loads(constraint.spec)[0])
    if constraint.kind == "regex":  # of literal alternatives
        text = re.sub(r"[()?:^$]", "", constraint.spec).split("|")[0]
        if re.fullmatch(constraint.spec, text):
            return text
    raise ValueError(f"No answer is written for {constraint.kind} {constraint.spec}.")


def instance(schema: Any, root: Any, folder: str, name: str = "") -> Any:
    """Return a small value of a JSON schema; the parts of an edit or a command change the agent's file."""
    if not isinstance(schema, dict):
        return ""
    if "$ref" in schema:
        found = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return instance(found, root, folder, name)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return instance(
                {**schema[key][0], **({"type": schema["type"]} if "type" in schema else {})},
                root,
                folder,
                name,
            )
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        members = schema.get("properties", {})
        return {key: instance(members[key], root, folder, key) for key in schema.get("required", members)}
    if kind == "array":
        if name == "command":  # as some agents have it
            return ["bash", "-c", command(folder)]
        items = schema.get("items", {})
        return [instance(items, root, folder, name) for _ in range(max(1, schema.get("minItems", 1)))]
    if kind in ("integer", "number"):
        return schema.get("minimum", 1)
    if kind in ("boolean", "null"):
        return False if kind == "boolean" else None
    return text_for(name.lower(), folder)[: schema.get("maxLength")].ljust(schema.get("minLength", 0), "x")


def text_for(name: str, folder: str) -> str:
    """Return a string for a member of this name."""
    if "path" in name or name in ("file", "filename"):
        return f"{folder}/{FILE}"
    if "command" in name or name == "cmd":
        return command(folder)
    if name.startswith("old") or name in ("search", "find"):
        return OLD
    if name.startswith("new") or name in ("replace", "replacement"):
        return NEW
    if name in ("content", "contents"):
        return f"{NEW}\n"
    return name or "text"


def command(folder: str) -> str:
    """Return the shell command that changes the file."""
    return f"sed -i s/{OLD}/{NEW}/ {folder}/{FILE}"


# ---- the engine process -----------------------------------------------------------------------------


def run_engine(fd: int, folder: str) -> None:
    """Handle the commands of the channel; every request gets one token of its answer a step."""
    from microvllm.runtime.metrics.stats import EngineStats
    from microvllm.runtime.process.channel import Abort, Add, EngineEnd, Ready, Start, Step
    from microvllm.runtime.process.heartbeat import Heartbeat
    from microvllm.runtime.request import FinishReason, StepOutput
    from microvllm.runtime.text.tokenizer import Tokenizer

    channel = EngineEnd(socket.socket(fileno=fd))
    with contextlib.suppress(EOFError, OSError):
        (start,) = channel.receive_commands(wait=True)
        if not isinstance(start, Start):
            raise TypeError(f"the first command must be Start, not {type(start).__name__}")
        tokenizer = Tokenizer.load(Path(start.config.tokenizer_path))
        end = start.config.spec.eos_token_ids[0]
        stats = EngineStats(kv_blocks_total=start.config.num_blocks)
        channel.send_event(Ready(stats, start.config.max_model_len))
        heartbeat = Heartbeat(channel)
        heartbeat.begin()
        left: dict[int, list[int]] = {}
        while True:
            heartbeat.resting = not left
            refused: list[StepOutput] = []
            for each in channel.receive_commands(wait=not left):
                if isinstance(each, Add):
                    for request in (sample for samples in each.samples() for sample in samples):
                        prompt = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
                        try:
                            text = answer(prompt, request.params.structured_outputs, folder)
                        except ValueError as error:
                            refused.append(
                                StepOutput(request.request_id, [], FinishReason.ERROR, error=str(error))
                            )
                            continue
                        ids = [*tokenizer.encode(text, add_special_tokens=False), end]
                        left[request.request_id] = ids[: request.params.max_tokens]
                elif isinstance(each, Abort):
                    for request_id in each.request_ids:
                        left.pop(request_id, None)
            outputs = refused
            for request_id, ids in list(left.items()):
                token = ids.pop(0)
                finish = None
                if not ids:
                    del left[request_id]
                    finish = FinishReason.STOP if token == end else FinishReason.LENGTH
                outputs.append(StepOutput(request_id, [token], finish))
            if outputs:
                channel.send_event(Step(outputs, EngineStats(num_running=len(left))))


def main() -> None:
    if sys.argv[1:2] == ["engine"]:
        run_engine(int(sys.argv[2]), sys.argv[3])
        return
    replace_engine(Path(__file__).resolve(), str(Path.cwd()))
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    serve("--model", "smollm2-135m-instruct", *FLAGS, *sys.argv[1:])


if __name__ == "__main__":
    main()
