"""A model that writes recorded outputs, what it writes, and how the SDKs add up what is streamed."""

from __future__ import annotations

from typing import Any

from fake_client import FakeClient
from http_tools import events, in_process

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "weather?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get it",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich \\"x\\""}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
ARGUMENTS = {"city": 'Zürich "x"'}
HERMES = {"tool_call_parser": "hermes"}


async def ask(
    output: str | list[str], /, *, path: str = CHAT, args: dict[str, Any] | None = None, **body: Any
) -> tuple[int, Any, FakeClient]:
    """Status, answer or events, and the client, of a request to a model that writes `output`."""
    client = FakeClient(max_model_len=4096)
    client.recorded = [output] if isinstance(output, str) else output
    async with in_process(client, **(HERMES if args is None else args)) as http:
        answer = await http.post(path, json={"messages": USER, **body})
    streamed = body.get("stream") and answer.status_code == 200
    return answer.status_code, events(answer.text) if streamed else answer.json(), client


def assembled(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The message of a choice, as the SDKs add it up; checks the form of each piece."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            if choice["finish_reason"] is not None:
                assert "finish_reason" not in message, "one chunk ends a choice"
                message["finish_reason"] = choice["finish_reason"]
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
                    continue
                assert len(value) == 1, "clients read one piece of a chunk"
                piece, calls = value[0], message.setdefault("tool_calls", [])
                if piece["index"] == len(calls):
                    assert piece["type"] == "function" and piece["id"] and piece["function"]["name"]
                    calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
                else:
                    assert piece["index"] == len(calls) - 1 and set(piece) == {"index", "function"}
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    return message
