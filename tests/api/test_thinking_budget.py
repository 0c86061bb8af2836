"""The budget of thinking x form or tools x endpoint x stream x stops x choices, drawn, beside an oracle.

The engine is the fake of `test_structured_matrix.py` with the budgets of the real one: it writes its thought
and its answer as far as both let it. What is to come out follows from the tokens alone, each of them a byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from chat_tools import TOOLS, assembled
from fake_client import EOS
from http_tools import events, in_process
from test_structured_matrix import FORMS, SCHEMA, ObedientClient

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.text.detokenizer import TextDelta
from microvllm.runtime.worker.thinking import FREE, Reasoner

THOUGHTS = ["", "hm", 'well,\n{"a": [1', "ä\n\n😀 <tool> x", "a b" * 30]
ANSWERS = ["", "No.", "I will not do that.", "Use [THINK] x[/THINK] or <think> y</think> here."]
DRAWS = 30
TAGS = {"mistral": ("[THINK]", "[/THINK]"), "deepseek_r1": ("<think>", "</think>")}


class ThinkingClient(ObedientClient):
    """Writes one wish for each choice; where its thought is cut off it goes on with what stands behind."""

    wishes: list[str]
    end = ""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[list[int]] = []

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        deltas = super().generate(request, salt)
        self.made.append([token for delta in deltas for token in delta.token_ids])
        return deltas

    def planned(self, request: EngineRequest) -> Callable[[list[int]], tuple[int, bool]]:
        budget, wish = request.params.thinking, self.wishes[request.sample % len(self.wishes)]
        reasoner = None if budget is None else Reasoner(budget)
        end, left = [*self.end.encode()], [*wish.encode(), EOS]
        behind, last = [*wish.partition(self.end)[2].encode(), EOS], -1

        def plan(made: list[int]) -> tuple[int, bool]:
            nonlocal left, last
            if made and made[-1] != last:  # a form has other wishes
                left = []
            forced = FREE if reasoner is None else reasoner.forced(made, False)[0]
            if forced != FREE and left[:1] != [forced]:
                left = [*end[end.index(forced) :], *behind]
            last = left.pop(0) if left else EOS
            return last, forced != FREE

        return plan


@pytest.fixture(scope="module")
def model() -> ThinkingClient:
    return ThinkingClient()


@dataclass
class Case:
    """One combination; `begins`: within its reasoning, behind it, or None if the model decides."""

    parser: str
    begins: bool | None
    wishes: list[str]
    path: str
    body: dict[str, Any]
    form: str | None
    budget: int | None
    stops: list[str]


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    path = draw.choice(["/v1/chat/completions"] * 3 + ["/v1/responses", "/v1/messages"])
    parser = draw.choice([*TAGS])
    begins = draw.choice([True, False, None]) if parser == "mistral" else True
    budget = draw.choice([0, 1, 2, 7, 1000, None])
    turned_on = path == "/v1/messages" and budget is not None and begins is not False
    begins = True if turned_on else begins
    start, end = TAGS[parser]
    wishes = []
    for _ in range(3):
        answer = draw.choice(ANSWERS)
        thinks = begins or (begins is None and draw.random() < 0.7)
        head = start if thinks and (begins is None or draw.random() < 0.2) else ""
        wishes.append(f"{head}{draw.choice(THOUGHTS)}{end}{answer}" if thinks else answer)
    stops = draw.choice([[], [], [], ["ll"], ["x", "😀"]])
    body: dict[str, Any] = {"max_tokens": draw.choice([600, 600, 600, 9]), "stream": draw.random() < 0.5}
    if parser == "mistral" and begins is not None:
        body["chat_template_kwargs"] = {"enable_thinking": begins}
    form = draw.choice([None, None, "json_schema", "regex", "required", "tools"])
    if path == "/v1/chat/completions":
        body |= {"messages": [{"role": "user", "content": "hi"}], "thinking_token_budget": budget}
        body |= {"stop": stops, "n": draw.choice([1, 1, 3]), "temperature": 1, "return_token_ids": True}
        if body["stream"]:
            body |= {"stream_options": {"include_usage": True}, "stream_interval": draw.choice([1, 5])}
        if form in FORMS:
            body |= FORMS[form][0]
        elif form is not None:
            body |= {"tools": TOOLS, "tool_choice": "required" if form == "required" else "auto"}
    elif path == "/v1/responses":
        form = draw.choice([None, "json_schema"])
        body |= {"input": "hi", "thinking_token_budget": budget, "max_output_tokens": body.pop("max_tokens")}
        body["stop"] = stops
        if form:
            body["text"] = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    else:
        form = draw.choice([None, "json_schema"])
        body |= {"messages": [{"role": "user", "content": "hi"}], "stop_sequences": stops}
        if turned_on:
            body["thinking"] = {"type": "enabled", "budget_tokens": budget}
        if form:
            body["output_config"] = {"format": {"type": "json_schema", "schema": SCHEMA}}
    return Case(parser, begins, wishes, path, body, form, budget, stops)


def parts(case: Case, made: list[int]) -> tuple[bytes | None, bytes, bool]:
    """The thought and what stands behind it, and whether the thought has ended."""
    text = bytes(token for token in made if token != EOS)
    start, end = (tag.encode() for tag in TAGS[case.parser])
    if case.begins is False or (case.begins is None and not text.startswith(start)):
        return None, text, True
    thought, ended, answer = text.removeprefix(start).partition(end)
    return thought, answer, bool(ended)


def check(case: Case, made: list[int], message: dict[str, Any], reason: str | None) -> int:
    """Check one choice; returns the number of tokens of its reasoning."""
    thought, answer, ended = parts(case, made)
    spent = 0 if thought is None else len(thought)
    if case.budget is not None:
        end = TAGS[case.parser][1].encode()  # of which a limit of tokens may leave a part
        cut = next(size for size in range(len(end), -1, -1) if (thought or b"").endswith(end[:size]))
        assert spent - (0 if ended else cut) <= case.budget
    stopped = any(stop.encode() in bytes(token for token in made if token != EOS) for stop in case.stops)
    shown = (thought or b"").decode(errors="replace")
    for stop in case.stops:
        shown = shown.partition(stop)[0]
    assert (message.get("reasoning") or "").strip("\n") == shown.strip("\n")
    if reason == "length" or stopped:
        return spent
    assert made[-1] == EOS and ended
    content = message.get("content") or ""
    if case.form in FORMS:
        assert FORMS[case.form][1](content)
    elif case.form == "required":
        assert message["tool_calls"] and not content
    else:
        assert content.strip("\n") == answer.decode().strip("\n")
    return spent


def read(case: Case, answer: httpx.Response) -> tuple[list[dict[str, Any]], list[str | None], int | None]:
    """The messages and finish reasons of the choices, and the reasoning tokens of the usage."""
    assert answer.status_code == 200, answer.text
    if case.path == "/v1/chat/completions":
        if case.body["stream"]:
            chunks = events(answer.text)
            found = [assembled(chunks, index) for index in range(case.body["n"])]
            reasons = [message["finish_reason"] for message in found]
            return found, reasons, chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"]
        choices, usage = answer.json()["choices"], answer.json()["usage"]
        return (
            [choice["message"] for choice in choices],
            [choice["finish_reason"] for choice in choices],
            usage["completion_tokens_details"]["reasoning_tokens"],
        )
    data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if case.path == "/v1/responses":
        whole = data[-1]["response"] if case.body["stream"] else answer.json()
        texts = {item["type"]: item["content"][0]["text"] for item in whole["output"] if item["content"]}
        message = {"reasoning": texts.get("reasoning"), "content": texts.get("message")}
        reason = "length" if whole["status"] == "incomplete" else "stop"
        return [message], [reason], whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    if not case.body["stream"]:
        whole = answer.json()
        blocks = {block["type"]: block for block in whole["content"]}
        message = {"reasoning": blocks.get("thinking", {}).get("thinking")}
        message["content"] = blocks.get("text", {}).get("text")
        end, usage = whole["stop_reason"], whole["usage"]
    else:
        message = {"reasoning": "", "content": ""}
        for event in data:
            piece = event.get("delta", {})
            message["reasoning"] += piece.get("thinking", "")
            message["content"] += piece.get("text", "")
        end, usage = data[-2]["delta"]["stop_reason"], data[-2]["usage"]
    reason = "length" if end in ("max_tokens", "model_context_window_exceeded") else "stop"
    return [message], [reason], usage["output_tokens_details"]["thinking_tokens"]


@pytest.mark.parametrize("first", range(0, DRAWS, 10))
async def test_the_budget_in_combination(model: ThinkingClient, first: int) -> None:
    for seed in range(first, first + 10):
        case = drawn(seed)
        model.wishes, model.end, model.made = case.wishes, TAGS[case.parser][1], []
        async with in_process(model, reasoning_parser=case.parser, tool_call_parser="hermes") as http:
            answer = await http.post(case.path, json=case.body)
        messages, reasons, reported = read(case, answer)
        spent = [check(case, *each) for each in zip(model.made, messages, reasons, strict=True)]
        assert reported == sum(spent), case
