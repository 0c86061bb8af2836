"""Forms of the output x reasoning x endpoint: each is enforced, behind the reasoning, or answered 400.

The engine is a fake that draws only tokens that the form allows, and among them what the model wants to
write: its reasoning, or a text that has not the form. So a form that is ignored shows, and so does one that
begins too early or too late.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from chat_tools import TOOLS, WEATHER, assembled
from fake_client import EOS, VOCAB_SIZE, FakeClient
from http_tools import events, in_process
from llguidance import LLMatcher, LLTokenizer

from microvllm.runtime.grammar.masks import Row
from microvllm.runtime.grammar.vocabulary import model_tokenizer
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput
from microvllm.runtime.text.chat_template import ChatTemplate
from microvllm.runtime.text.detokenizer import OutputProcessor, TextDelta

# A template that opens the reasoning, closes it, or leaves it to the model.
TEMPLATE = (
    "{{ messages[-1].content }}\n{% if enable_thinking is defined %}"
    "{% if enable_thinking %}[THINK]\n{% else %}[THINK]\n\n[/THINK]\n\n{% endif %}{% endif %}"
)
CLOSERS = [EOS, *b'}]">{']  # what makes an output short
IN_TEXT = [EOS, *b'"<']  # the same where nearly anything may come


class ObedientClient(FakeClient):
    """Writes `wish` as far as the form allows it, and then whatever the form wants, as short as it can."""

    wish = ""

    def __init__(self) -> None:
        super().__init__(max_model_len=4096)
        self.processor.template = ChatTemplate(TEMPLATE, {})

    @functools.cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        return model_tokenizer(self.tokenizer, VOCAB_SIZE, [EOS])  # type: ignore[arg-type]

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        form, plan = request.params.structured_outputs, self.planned(request)
        row = None
        if form is not None:
            matcher = LLMatcher(self.grammar_tokenizer, request.grammar, log_level=0)
            row = Row(form, lambda: matcher, VOCAB_SIZE)
            row.advance([])
        processor = OutputProcessor(self.tokenizer, request)  # type: ignore[arg-type]
        made: list[int] = []
        deltas: list[TextDelta] = []
        limit = request.params.max_tokens or 1000
        while not deltas or deltas[-1].finish_reason is None:
            wished, forced = plan(made)
            token = wished if forced else self._allowed(row, wished, made)
            made.append(token)
            if row is not None:
                row.advance([token])
            end = FinishReason.STOP if token == EOS else FinishReason.LENGTH if len(made) == limit else None
            deltas.append(processor.process(StepOutput(-1, [token], end)))
        return deltas

    def planned(self, request: EngineRequest) -> Callable[[list[int]], tuple[int, bool]]:
        """What says, behind what was written, which token is wished for, and whether it is forced."""
        wishes = self.tokenizer.encode(self.wish, False)

        def plan(made: list[int]) -> tuple[int, bool]:
            keeps = made == wishes[: len(made)] and len(made) < len(wishes)
            return (wishes[len(made)] if keeps else EOS), False

        return plan

    @staticmethod
    def _allowed(row: Row | None, wished: int, made: list[int]) -> int:
        mask = None if row is None else row.mask(len(made))
        if mask is None:
            return wished
        allowed = [token for token in range(VOCAB_SIZE) if mask[token // 32] >> (token % 32) & 1]
        assert allowed, "a dead end"
        if wished in allowed:
            return wished
        allowed = [token for token in allowed if token != ord("[")] or allowed  # it thinks by its wish only
        closers = CLOSERS if len(allowed) < 100 else IN_TEXT
        closer = next((token for token in closers if token in allowed), None)
        return (
            allowed[hashlib.sha256(bytes(made)[-9:]).digest()[0] % len(allowed)] if closer is None else closer
        )


@pytest.fixture(scope="module")
def model() -> Iterator[ObedientClient]:
    yield ObedientClient()  # one for all: its processor has child processes that check grammars


# ---- what the model does, where the reasoning is, and what is to come out --------------------------

UNFORMED = "I will not do that."  # what a model writes that does not heed the form
THOUGHT = 'hm, {"a": [1'


@dataclass(frozen=True)
class Situation:
    """The flags, the request's template variables, what the model wants to write, and its reasoning."""

    args: dict[str, Any]
    wish: str
    thought: str | None = None
    variables: dict[str, Any] | None = None


# Its tags begin with a byte, which is a token here, that no form begins with.
TAGS, R1 = {"reasoning_parser": "mistral"}, {"reasoning_parser": "deepseek_r1"}
SITUATIONS = {
    "no parser": Situation({}, UNFORMED),
    "decides to think": Situation(TAGS, f"[THINK]{THOUGHT}[/THINK]{UNFORMED}", THOUGHT),
    "decides not to": Situation(TAGS, UNFORMED),
    "opened": Situation(TAGS, f"{THOUGHT}[/THINK]{UNFORMED}", THOUGHT, {"enable_thinking": True}),
    "closed": Situation(TAGS, UNFORMED, None, {"enable_thinking": False}),
    "implied": Situation(R1, f"{THOUGHT}</think>{UNFORMED}", THOUGHT),
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
Check = Callable[[str], Any]


def is_schema(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["a"] and value["a"] in (1, 2)


def matches(pattern: str) -> Check:
    return lambda text: re.fullmatch(pattern, text)


FORMS: dict[str, tuple[dict[str, Any], Check]] = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        is_schema,
    ),
    "json_object": (
        {"response_format": {"type": "json_object"}},
        lambda text: isinstance(json.loads(text), dict),
    ),
    "structural_tag": (
        {
            "response_format": {
                "type": "structural_tag",
                "format": {
                    "type": "tag",
                    "begin": "<f>",
                    "content": {"type": "json_schema", "json_schema": SCHEMA},
                    "end": "</f>",
                },
            }
        },
        lambda text: is_schema(text.removeprefix("<f>").removesuffix("</f>")) and text.startswith("<f>"),
    ),
    "json": ({"structured_outputs": {"json": SCHEMA}}, is_schema),
    "regex": ({"structured_outputs": {"regex": "[ab]{3}x"}}, matches("[ab]{3}x")),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, matches("yes|no")),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "ab" | "cd"'}}, matches("ab|cd")),
    "guided_json": ({"guided_json": SCHEMA}, is_schema),
    "guided_regex": ({"guided_regex": "[ab]{3}x"}, matches("[ab]{3}x")),
}


@asynccontextmanager
async def served(client: ObedientClient, situation: Situation) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(client, **{"tool_call_parser": "hermes", **situation.args}) as http:
        yield http


async def chat(http: httpx.AsyncClient, situation: Situation, **fields: Any) -> Any:
    """The message of a chat, whole or added up from its stream; the error if it is refused."""
    variables = {} if situation.variables is None else {"chat_template_kwargs": situation.variables}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 600, **variables, **fields}
    answer = await http.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return answer.json()
    if fields.get("stream"):
        return assembled(events(answer.text))
    return answer.json()["choices"][0]["message"]


SITUATED = pytest.mark.parametrize("name", SITUATIONS)
WAYS: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "stream_interval": 7}]


@SITUATED
async def test_a_chat_keeps_the_form_behind_its_reasoning(model: ObedientClient, name: str) -> None:
    situation = SITUATIONS[name]
    model.wish = situation.wish
    async with served(model, situation) as http:
        for (form, (fields, check)), way in itertools.product(FORMS.items(), WAYS):
            message = await chat(http, situation, **fields, **way)
            assert message.get("reasoning") == situation.thought, (form, way, message)
            assert check(message["content"]), (form, way, message)


@SITUATED
@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
async def test_a_text_has_the_form_from_its_beginning(model: ObedientClient, name: str, path: str) -> None:
    """A completion has no reasoning of its own: its text is all there is."""
    situation = SITUATIONS[name]
    model.wish = situation.wish
    async with served(model, situation) as http:
        for form, (fields, check) in FORMS.items():
            answer = (await http.post(path, json={"prompt": "hi", "max_tokens": 600, **fields})).json()
            assert check(answer["choices"][0]["text"] if "choices" in answer else answer["text"]), form


@SITUATED
async def test_a_response_keeps_the_form_behind_its_reasoning(model: ObedientClient, name: str) -> None:
    situation = SITUATIONS[name]
    model.wish = situation.wish
    variables = {} if situation.variables is None else {"chat_template_kwargs": situation.variables}
    schema = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    async with served(model, situation) as http:
        for form, stream in itertools.product((schema, {"type": "json_object"}), (False, True)):
            body = {"input": "hi", "text": {"format": form}, "stream": stream, **variables}
            answer = await http.post("/v1/responses", json=body)
            assert answer.status_code == 200, answer.text
            if stream:
                last = [line for line in answer.text.split("\n") if line.startswith("data: {")][-1]
                found = json.loads(last[6:])["response"]
            else:
                found = answer.json()
            texts = {item["type"]: item["content"][0]["text"] for item in found["output"]}
            assert texts.get("reasoning") == situation.thought
            value = json.loads(texts["message"])
            assert isinstance(value, dict) and (form is not schema or is_schema(texts["message"]))


@SITUATED
async def test_a_message_keeps_the_form_behind_its_reasoning(model: ObedientClient, name: str) -> None:
    """And with `tool_choice` any, calls are made behind it."""
    situation = SITUATIONS[name]
    model.wish = situation.wish
    variables = {} if situation.variables is None else {"chat_template_kwargs": situation.variables}
    schema = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    tools = [{"name": "get_time", "input_schema": {"type": "object", "additionalProperties": False}}]
    async with served(model, situation) as http:
        for fields in (schema, {"tools": tools, "tool_choice": {"type": "any"}}):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 600, **variables, **fields}
            answer = (await http.post("/v1/messages", json=body)).json()
            blocks = {block["type"]: block for block in answer["content"]}
            assert blocks.get("thinking", {}).get("thinking") == situation.thought, answer
            if fields is schema:
                assert is_schema(blocks["text"]["text"])
            else:
                assert (blocks["tool_use"]["name"], blocks["tool_use"]["input"]) == ("get_time", {})


@SITUATED
async def test_a_call_is_made_behind_the_reasoning(model: ObedientClient, name: str) -> None:
    situation = SITUATIONS[name]
    model.wish = situation.wish
    named = {"type": "function", "function": {"name": "get_weather"}}
    async with served(model, situation) as http:
        for choice, way in itertools.product(("required", named), WAYS):
            message = await chat(http, situation, tools=TOOLS, tool_choice=choice, **way)
            assert message.get("reasoning") == situation.thought and not message["content"]
            made = [
                (call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in message["tool_calls"]
            ]
            assert made and all(isinstance(arguments, dict) for _, arguments in made)
            assert all(isinstance(found["city"], str) for name, found in made if name == "get_weather")
            assert choice == "required" or [name for name, _ in made] == ["get_weather"]


@SITUATED
async def test_a_strict_call_follows_its_schema(model: ObedientClient, name: str) -> None:
    situation = SITUATIONS[name]
    wrong = '<tool_call>\n{"name": "get_weather", "arguments": {"town": 1}}\n</tool_call>'
    model.wish = situation.wish.replace(UNFORMED, wrong)
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    async with served(model, situation) as http:
        message = await chat(http, situation, tools=[strict])
        arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
        assert isinstance(arguments["city"], str) and message.get("reasoning") == situation.thought
        message = await chat(http, situation, tools=[WEATHER])
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"town": 1}


@SITUATED
async def test_with_tools_the_answer_has_the_form_or_is_a_call(model: ObedientClient, name: str) -> None:
    situation = SITUATIONS[name]
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    calling = situation.wish.replace(UNFORMED, call)
    async with served(model, situation) as http:
        for (form, (fields, check)), wish in itertools.product(FORMS.items(), (situation.wish, calling)):
            model.wish = wish
            message = await chat(http, situation, tools=TOOLS, **fields)
            if form in ("structural_tag", "grammar"):
                assert message["error"]["param"] in fields and message["error"]["code"] == 400, message
                continue
            assert message.get("reasoning") == situation.thought
            if "tool_calls" not in message:
                assert wish is not calling and check(message["content"]), (form, message)
                continue
            assert message["content"] is None
            for made in message["tool_calls"]:
                assert isinstance(json.loads(made["function"]["arguments"]), dict)


async def test_where_only_calls_may_come_a_form_is_not_ignored(model: ObedientClient) -> None:
    """A `response_format` is that of the text beside the calls, as in OpenAI's: there is none."""
    model.wish = UNFORMED
    async with served(model, SITUATIONS["no parser"]) as http:
        for form in ("regex", "choice", "grammar", "guided_json", "json_schema"):
            fields, _ = FORMS[form]
            message = await chat(http, SITUATIONS["no parser"], tools=TOOLS, tool_choice="required", **fields)
            if form == "json_schema":
                assert message["tool_calls"]
                continue
            assert message["error"]["param"] in fields and message["error"]["code"] == 400, message
