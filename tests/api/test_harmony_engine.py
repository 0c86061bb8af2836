"""Harmony from end to end: a tiny gpt-oss that says recorded outputs, served, with formats that `auto` finds.

The model has random weights but for its head, which is the exact solution of linear equations: of the hidden
states along each output, which transformers computes, one for the token that follows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio
import torch
from chat_tools import CHAT, WEATHER, assembled
from http_tools import events, in_process
from model_tools import make_engine
from mxfp4_folder import edit_tensors, to_mxfp4
from tiny_models import make_hf_folder, reference, write_harmony_tokenizer

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process.client import EngineClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

ARGUMENTS = {"city": "Bern"}
CALL = (
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    f"{json.dumps(ARGUMENTS)}<|call|>"
)
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
        }
    ],
}


CITY = {"type": "object", "properties": {"city": {"enum": ["Bern"]}}, "required": ["city"]}
MAP = {"name": "get_map", "parameters": {**CITY, "additionalProperties": False}, "strict": True}
TOOLS = [WEATHER, {"type": "function", "function": MAP}]


class Turn(NamedTuple):
    """A conversation, the tools that go with it, and what the model says then."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    output: str


ASKED = [{"role": "user", "content": "weather?"}]
TURNS = {
    "answer": Turn(
        [{"role": "user", "content": "hi"}],
        None,
        "<|channel|>analysis<|message|>A wave.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Hello!<|return|>",
    ),
    "call": Turn(ASKED, TOOLS, f"<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{CALL}"),
    "result": Turn(
        [*ASKED, CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "sun"}],
        TOOLS[:1],
        "<|channel|>final<|message|>Sun.<|return|>",
    ),
}


def written(folder: Path) -> Path:
    """The folder of the model."""
    make_hf_folder(
        folder,
        "gpt_oss",
        vocab_size=328,
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        tokenizer=False,
    )
    write_harmony_tokenizer(folder)
    rounded = to_mxfp4(Path(shutil.copytree(folder, folder.with_name("copy"))))
    edit_tensors(folder, **rounded)
    engine = make_engine(folder)
    model = reference(folder)
    states, following = [], []
    for turn in TURNS.values():
        messages = json.loads(json.dumps(turn.messages))
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            # As the API hands it to templates.
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        text = engine.processor.render_text(messages, **({"tools": turn.tools} if turn.tools else {}))
        prompt = engine.processor.tokenize_prompt(text, False)
        output = engine.tokenizer.encode(turn.output, False)
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + output])).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1].double())
        following += output
    wanted = torch.nn.functional.one_hot(torch.tensor(following), 328).double() * 20
    head = torch.linalg.lstsq(torch.cat(states), wanted, driver="gelsd").solution.T
    edit_tensors(folder, **{"lm_head.weight": head.float()})
    to_mxfp4(folder)  # whose values the experts already have
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    config = EngineArgs(
        model=str(written(tmp_path_factory.mktemp("harmony") / "gpt-oss")),
        dtype="float32",
        cpu_threads=1,
        num_gpu_blocks_override=256,
        max_num_seqs=4,
        max_num_batched_tokens=50,
    ).resolve()
    engine = await EngineClient.start(config)
    formats = {"reasoning_parser": "auto", "tool_call_parser": "auto", "enable_auto_tool_choice": True}
    async with in_process(engine, **formats) as client:  # type: ignore[arg-type]
        client.timeout = httpx.Timeout(120)
        yield client
    await engine.close()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", TURNS)
async def test_a_turn(http: httpx.AsyncClient, name: str, streamed: bool) -> None:
    turn = TURNS[name]
    body = {"messages": turn.messages, "temperature": 0, "stream": streamed, "max_tokens": 120}
    answer = await http.post(CHAT, json={**body, **({"tools": turn.tools} if turn.tools else {})})
    assert answer.status_code == 200, answer.text
    if streamed:
        message = assembled(events(answer.text))
        finish = message["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
    calls = [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
    ]
    said = message.get("reasoning"), message.get("content") or None
    if name == "call":
        assert said == ("Look.", None) and finish == "tool_calls"
        assert [(name, json.loads(arguments)) for name, arguments in calls] == [("get_weather", ARGUMENTS)]
        return
    assert not calls and finish == "stop"
    assert said == (("A wave.", "Hello!") if name == "answer" else (None, "Sun."))


async def test_a_call_that_must_be(http: httpx.AsyncClient) -> None:
    """Behind its reasoning the model would call another function."""
    turn, choice = TURNS["call"], {"type": "function", "function": {"name": "get_map"}}
    body = {"messages": turn.messages, "tools": turn.tools, "tool_choice": choice, "temperature": 0}
    answer = (await http.post(CHAT, json={**body, "max_tokens": 120})).json()
    message = answer["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    assert message["reasoning"] == "Look."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("get_map", ARGUMENTS)]


@pytest.mark.parametrize(
    ("name", "pattern", "reasoning", "content"),
    [
        ("result", "S[a-z]+[.]", None, "Sun."),
        ("answer", "H[a-z]+!", "A wave.", "Hello!"),
        ("result", "[A-F]{3}", None, None),
    ],
)
async def test_an_answer_of_a_form_with_and_without_reasoning(
    http: httpx.AsyncClient, name: str, pattern: str, reasoning: str | None, content: str | None
) -> None:
    """What the model would begin with is kept: no reasoning is forced on it, nor taken from it."""
    turn = TURNS[name]
    body = {"messages": turn.messages, "tools": turn.tools, "tool_choice": "none", "temperature": 0}
    body |= {"structured_outputs": {"regex": pattern}, "max_tokens": 120}
    choice = (await http.post(CHAT, json=body)).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "stop" and message.get("reasoning") == reasoning
    assert message["content"] == content if content else len(message["content"]) == 3
