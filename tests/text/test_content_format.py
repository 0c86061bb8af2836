"""The form of contents that a template gets: found or set, and rendered as transformers renders it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process
from jinja2 import Environment

from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import ConfigError, InvalidRequestError
from microvllm.runtime.text.chat_template import ChatTemplate, normalize_messages
from microvllm.runtime.text.content_format import detect_content_format
from microvllm.runtime.text.template_sandbox import Sandbox

SHOW = "{% if part.type == 'text' %}{{ part.text }}{% endif %}"
LOOP = "{% for part in CONTENT %}" + SHOW + "{% endfor %}"


def loop(content: str, name: str = "part") -> str:
    return LOOP.replace("CONTENT", content).replace("part", name)


def each(body: str) -> str:
    return "{% for m in messages %}<{{ m.role }}>" + body + "{% endfor %}"


MACRO = "{% macro show(parts, end='') %}" + loop("parts") + "{{ end }}{% endmacro %}"
PARTS = {
    "attribute": each(loop("m.content")),
    "key": each(loop("m['content']")),
    "get": each(loop("m.get('content', [])")),
    "other names": "{% for turn in messages %}{% for piece in turn['content'] %}{{ piece['text'] }}"
    "{% endfor %}{% endfor %}",
    "assigned": each("{% set text = m.content %}" + loop("text")),
    "assigned twice": each("{% set a = m['content'] %}{% set b = a %}" + loop("b")),
    "assigned as a pair": each("{% set who, what = m.role, m.content %}" + loop("what")),
    "conditional": each("{% set c = m.content if m.content else [] %}" + loop("c")),
    "or": each("{% set c = m.content or [] %}" + loop("c")),
    "filter": each(loop("m.content | list")),
    "default": each(loop("(m.content | default([]))")),
    "selected": each(loop("m.content | selectattr('type', 'equalto', 'text')")),
    "slice": each(loop("m.content[:5]")),
    "string test": each(
        "{% if m.content is string %}{{ m.content }}{% else %}" + loop("m.content") + "{% endif %}"
    ),
    "not string": each(
        "{% set c = m.content %}{% if c is not string %}" + loop("c") + "{% else %}{{ c }}{% endif %}"
    ),
    "iterable test": each("{% if m.content is iterable %}" + loop("m.content") + "{% endif %}"),
    "sliced messages": "{% set rest = messages[1:] if messages[0].role == 'none' else messages %}"
    "{% for m in rest %}" + loop("m.content") + "{% endfor %}",
    "reversed messages": "{% for m in messages | reverse %}" + loop("m.content") + "{% endfor %}",
    "joined messages": "{% set all = [messages[0]] + messages[1:] %}{% for m in all %}"
    + loop("m.content")
    + "{% endfor %}",
    "first message": "{% set first = messages[0]['content'] %}" + loop("first"),
    "first message, filter": loop("(messages | first).content"),
    "message by index": "{% for i in range(messages | length) %}"
    + loop("messages[i].content")
    + "{% endfor %}",
    "mapped": "{% for c in messages | map(attribute='content') %}" + loop("c") + "{% endfor %}",
    "namespace": "{% set ns = namespace(talk=messages) %}{% for m in ns.talk %}"
    + loop("m.content")
    + "{% endfor %}",
    "namespace content": each(
        "{% set ns = namespace() %}{% set ns.c = m.content %}" + loop("ns.c") + loop("ns['x']")
    ),
    "macro": MACRO + each("{{ show(m.content) }}"),
    "macro, by name": MACRO + each("{{ show(end='!', parts=m['content']) }}"),
    "macro through macro": MACRO
    + "{% macro outer(c) %}{{ show(c) }}{% endmacro %}"
    + each("{{ outer(m.content) }}"),
    "macro of a message": "{% macro show(message) %}"
    + loop("message.content")
    + "{% endmacro %}"
    + each("{{ show(m) }}"),
    "macro, assigned": "{% macro show(c) %}{% set d = c %}"
    + loop("d")
    + "{% endmacro %}"
    + each("{{ show(m.content) }}"),
    "index": each("{{ m.content[0]['text'] }}"),
    "first part": each("{{ (m.content | first).text }}"),
    "texts joined": each("{{ m.content | map(attribute='text') | join }}"),
    "tool use": "{% if tools %}{{ tools | tojson }}{% endif %}"
    + each(
        "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}"
        "{% elif m.role == 'tool' %}{{ m.content }}{% else %}" + loop("m.content") + "{% endif %}"
    ),
    "recursive": "{% set m = messages[0] %}{% set m = m %}{% set c = m.content %}{% set c = c %}" + loop("c"),
}
TEXTS = {
    "plain": each("{{ m.content }}"),
    "trim": each("{{ m['content'] | trim }}"),
    "assigned": each("{% set content = m.content | trim %}{{ content }}"),
    "string test": each("{% if m.content is string %}{{ m.content }}{% else %}{{ '' }}{% endif %}"),
    "string test, index": each(
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    ),
    "other loops": each(
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{% for name in call.function.arguments %}{{ name }}{% endfor %}{% endfor %}"
    ),
    "lines": each("{% for line in m.content.split('\n') %}{{ line }}{% endfor %}"),
    "character": each("{% if m.content[0].isupper() %}!{% endif %}{{ m.content }}"),
    "length": each("{% for i in range(m.content | length) %}.{% endfor %}{{ m.content }}"),
    "tools": "{% macro items(list) %}{% for item in list %}{{ item }}{% endfor %}{% endmacro %}"
    "{% for tool in tools or [] %}{{ items(tool.function.parameters.required) }}{% endfor %}"
    + each("{{ m.content }}"),
    "documents": "{% for d in documents or [] %}"
    + loop("d.content")
    + "{% endfor %}"
    + each("{{ m.content }}"),
    "roles": "{% for role in messages | map(attribute='role') %}{{ role }}{% endfor %}"
    + each("{{ m.content }}"),
    "nothing": "",
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]},
    {"role": "assistant", "content": "A text  "},
]


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def as_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        for message in as_parts(messages)
    ]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("continued", [False, True])
def test_a_template_for_parts_gets_parts(name: str, continued: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(PARTS[name], {}, Sandbox())
    assert (template.error, template.content_format) == (None, "openai")
    options: dict[str, Any] = {"add_generation_prompt": not continued}
    # Some of the templates show less than the last message.
    if continued and "text  " in template.render(normalize_messages(TALK)):
        options["continue_final_message"] = True
    text = template.render(normalize_messages(TALK), tools=None, **options)
    (expected,), _ = render_jinja_template([as_parts(TALK)], chat_template=PARTS[name], **options)
    assert text == expected and (continued or "Be brief." in text)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("continued", [False, True])
def test_a_template_for_texts_gets_texts(name: str, continued: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(TEXTS[name], {}, Sandbox())
    assert (template.error, template.content_format) == (None, "string")
    continued = continued and name != "nothing"
    options: dict[str, Any] = {"add_generation_prompt": not continued, "continue_final_message": continued}
    text = template.render(normalize_messages(TALK), tools=None, **options)
    (expected,), _ = render_jinja_template([as_texts(TALK)], chat_template=TEXTS[name], **options)
    assert text == expected


def test_a_name_of_a_macro_is_not_that_of_the_template() -> None:
    source = "{% macro f(c) %}" + loop("c") + "{% endmacro %}{{ f(tools) }}"
    assert (
        detect_content_format(Environment().parse(source + each("{% set c = m.content %}{{ c }}")))
        == "string"
    )
    assert detect_content_format(Environment().parse(source + each("{{ f(m.content) }}"))) == "openai"


def test_long_chains_of_names_are_followed() -> None:
    chain = "".join(f"{{% set a{n} = a{n + 1} %}}" for n in range(100)) + "{% set a100 = m.content %}"
    assert ChatTemplate(each(chain + loop("a0")), {}, Sandbox()).content_format == "openai"


def test_the_form_can_be_set() -> None:
    messages = normalize_messages([{"role": "user", "content": ["a", "b"]}])
    template = ChatTemplate(each("{{ m.content | tojson }}"), {}, Sandbox())
    for form, content in (
        ("auto", '"a\\nb"'),
        ("string", '"a\\nb"'),
        ("openai", '[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'),
    ):
        assert template.render(messages, chat_template_content_format=form) == "<user>" + content
    assert messages[0]["content"][0] == {"type": "text", "text": "a"}


def test_a_tools_result_stays_a_text() -> None:
    source = each(
        "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}" + loop("m.content") + "{% endif %}"
    )
    for content in ("one\ntwo", ["one", {"type": "text", "text": "two"}]):
        talk = [{"role": "user", "content": "hi"}, {"role": "tool", "tool_call_id": "1", "content": content}]
        assert (
            ChatTemplate(source, {}, Sandbox()).render(normalize_messages(talk))
            == '<user>hi<tool>"one\\ntwo"'
        )


def test_a_message_of_tool_calls_alone_has_no_part() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    talk = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    source = each("{% if m.content %}!{% endif %}" + loop("m.content"))
    assert ChatTemplate(source, {}, Sandbox()).render(talk) == "<assistant>"
    with pytest.raises(InvalidRequestError, match="no content to continue"):
        ChatTemplate(source, {}, Sandbox()).render(
            talk, add_generation_prompt=False, continue_final_message=True
        )


async def prompt_of(template: str, content: Any, **args: Any) -> str:
    client = FakeClient()
    client.processor.template = ChatTemplate(template, {}, Sandbox())
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "return_prompt_text": True}
    async with in_process(client, **args) as http:
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        tokens = await http.post("/tokenize", json={"messages": body["messages"]})
    text = answer.json()["prompt_text"]
    assert bytes(tokens.json()["tokens"]).decode() == text
    return str(text)


async def test_over_http() -> None:
    for content in ("Is it?", ["Is it?"], [{"type": "text", "text": "Is it?"}]):
        for form in ("auto", "openai"):
            text = await prompt_of(PARTS["key"], content, chat_template_content_format=form)
            assert text == "<user>Is it?"
    assert await prompt_of(TEXTS["plain"], ["a", "b"]) == "<user>a\nb"
    assert await prompt_of(PARTS["key"], "a", chat_template_content_format="string") == "<user>"


async def test_an_echoed_message_of_parts() -> None:
    client = FakeClient()
    client.processor.template = ChatTemplate(PARTS["key"], {}, Sandbox())
    talk = [{"role": "assistant", "content": ["a", "b"]}]
    async with in_process(client) as http:
        answer = await http.post(
            "/v1/chat/completions",
            json={"messages": talk, "max_tokens": 1, "echo": True, "add_generation_prompt": False},
        )
    assert answer.json()["choices"][0]["message"]["content"].startswith("a\nb")


def test_a_wrong_form_is_named() -> None:
    with pytest.raises(
        ConfigError, match="--chat-template-content-format must be one of auto, string, openai"
    ):
        ServerArgs(chat_template_content_format="parts")
