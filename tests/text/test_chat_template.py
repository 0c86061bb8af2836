"""Chat templates: the text transformers gives, refusals that name the message, and templates gone wrong."""

from typing import Any

import pytest

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.chat_template import MAX_MESSAGES, ChatTemplate, content_text, normalize_messages
from microvllm.runtime.text.template_sandbox import Sandbox

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
TRIMMING = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|h|>' + message.role + '<|/h|>\n\n' + message['content'] | trim + '<|eot|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\n\n' }}{%- endif %}\n"
)
TOOLS = (
    "{%- if tools %}{{- '# Tools' }}"
    "{% for tool in tools %}{{- '\n' ~ (tool | tojson) }}{% endfor %}{% endif %}\n"
    "{%- set ns = namespace(last=-1, count=0) %}\n"
    "{%- for message in messages[::-1] %}\n    {%- set ns.count = ns.count + 1 %}\n"
    "    {%- if message.role == 'user' and ns.last < 0 %}"
    "{%- set ns.last = messages | length - loop.index %}{% endif %}\n"
    "{%- endfor %}\n"
    "{%- macro call(c) %}<call>{{ c.function.name }}"
    "({{ c.function.arguments | tojson(indent=2) }}){% endmacro %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'developer' %}{% continue %}{% endif %}\n"
    "    {%- if message.tool_calls is defined and message.tool_calls %}\n"
    "        {%- for c in message.tool_calls %}{{ call(c) }}{% endfor %}\n"
    "    {%- endif %}\n"
    "    {%- if message.reasoning_content is string and loop.index0 > ns.last %}"
    "<think>{{ message.reasoning_content.strip('\n') }}</think>{% endif %}\n"
    "    {%- generation %}{{ message.role ~ ': ' ~ message.content.split('x')[0].rstrip() }}"
    "{% endgeneration %}\n"
    "{%- endfor %}{{ ns.last }}/{{ ns.count }} {{ '%s|%d' % ('é', 3) }}"
    " {{ '=' * 5 }} {{ 2 ** 8 }} {{ 7 % 4 }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<no_think>{% endif %}"
    " {{ messages | map(attribute='role') | join(', ') }} {{ strftime_now('%Y') | length }}"
)
TALK = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": " Grüße 日本 <b>'&\" \n"},
    {"role": "assistant", "content": "Hi ", "reasoning": "\nhm\n"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "é", "b": [1]}'}}],
    },
    {
        "role": "tool",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        "tool_call_id": "1",
    },
    {"role": "assistant", "content": "The answer is  "},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "é <x>", "parameters": {"type": "object"}},
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, /, **kwargs: Any) -> str:
    return ChatTemplate(source, SPECIAL, Sandbox()).render(messages, **kwargs)


@pytest.mark.parametrize("source", [CHATML, TRIMMING, TOOLS], ids=["chatml", "trimming", "tools"])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("length", range(1, len(TALK) + 1))
def test_same_text_as_transformers(source: str, continued: bool, length: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = normalize_messages(TALK[:length])
    texts = [{**message, "content": content_text(message["content"])} for message in messages]
    options: dict[str, Any] = {"add_generation_prompt": not continued, "continue_final_message": continued}
    expected, _ = render_jinja_template(
        [texts], tools=[TOOL], chat_template=source, enable_thinking=False, **options, **SPECIAL
    )
    assert render(source, messages, tools=[TOOL], enable_thinking=False, **options) == expected[0]


def test_special_tokens_can_be_set_by_name() -> None:
    assert render("{{ bos_token }}{{ eos_token }}", eos_token="E") == "<s>E"


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert (
        render("{{ messages[0].role }}{% if messages[0].role == 'developer' %}!{% endif %}", messages)
        == "developer!"
    )
    assert messages[0]["role"] == "developer"


def test_developer_and_system_messages_become_one_at_the_start() -> None:
    source = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    user = {"role": "user", "content": "hi"}
    developer = {"role": "developer", "content": [{"type": "text", "text": "b"}, "c"]}
    talk = normalize_messages(
        [{"role": "system", "content": "a"}, user, developer, {"role": "system", "content": ""}]
    )
    assert render(source, talk) == "[system: a\n\nb\nc][user: hi]"
    assert render(source, normalize_messages([user, developer])) == "[system: b\nc][user: hi]"
    # Without a developer message nothing moves, and a template that knows the role gets it where it is.
    assert render(source, [user, {"role": "system", "content": "a"}]) == "[user: hi][system: a]"
    assert render(source + "{% if 'developer' %}{% endif %}", talk).startswith(
        "[system: a][user: hi][developer: b\nc]"
    )


def test_tools_of_a_developer_are_shown_or_refused() -> None:
    talk = normalize_messages([{"role": "developer", "content": "x", "tools": [TOOL]}])
    assert talk[0]["tools"] == [TOOL]
    source = "{% if messages[0].role == 'developer' %}{{ messages[0].tools[0].function.name }}{% endif %}"
    assert render(source, talk) == "f"
    with pytest.raises(InvalidRequestError, match="hold tools of a developer"):
        render(CHATML, talk)
    assert "tools" not in normalize_messages([{"role": "user", "content": "x", "tools": [TOOL]}])[0]
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].tools must be a list"):
        normalize_messages([{"role": "developer", "content": "x", "tools": {}}])


def test_continue_excludes_the_generation_prompt() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(CHATML, continue_final_message=True, add_generation_prompt=True)
    assert caught.value.param == "continue_final_message"


def test_continue_needs_a_template_that_shows_the_content() -> None:
    with pytest.raises(InvalidRequestError, match="does not show"):
        render("{{ messages[0].role }}", continue_final_message=True, add_generation_prompt=False)


@pytest.mark.parametrize(
    "name", ["messages", "tokenize", "chat_template", "raise_exception", "range", "documents"]
)
def test_kwargs_cannot_replace_what_render_sets(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(CHATML, **{name: []})
    assert caught.value.param == "chat_template_kwargs" and name in caught.value.message


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if %}", "not valid (line 1"),
        ("\n{{ 'x' }", "not valid (line 2"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
        ("{{ raise_exception('Roles must\nalternate') }}", "refused the request: Roles must alternate"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_broken_template_fails_the_request_only(source: str, says: str) -> None:
    template = ChatTemplate(source, {}, Sandbox())
    for _ in range(2):
        with pytest.raises(InvalidRequestError) as caught:
            template.render(USER)
        assert says in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ (messages | attr('__class__')).x }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ namespace(__html__=1) }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ dict.update(messages[0], role='x') }}",
    ],
)
def test_the_sandbox_keeps_templates_away_from_python(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="failed"):
        render(source)
    assert USER == [{"role": "user", "content": "hi"}]


def test_output_is_capped() -> None:
    sandbox = Sandbox(max_chars=1000)
    with pytest.raises(InvalidRequestError, match="more than 1000 characters"):
        sandbox.render("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", {})
    assert len(sandbox.render("{{ 'x' * 1000 }}", {})) == 1000


# --- normalize_messages ---


def test_all_kinds_of_text_parts_become_one() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
        {"type": "thinking", "thinking": "e"},
        "f",
    ]
    (message,) = normalize_messages([{"role": "user", "content": parts, "extra": 1}])
    assert message.keys() == {"role", "content"} and content_text(message["content"]) == "a\nb\nc\nd\ne\nf"
    assert message["content"][0] == parts[0]
    assert message["content"][1:] == [{"type": "text", "text": text} for text in "bcdef"]
    assert normalize_messages([{"role": "assistant", "content": None}]) == [
        {"role": "assistant", "content": ""}
    ]
    assert normalize_messages([{"role": "assistant"}])[0]["content"] == ""
    refused = {"role": "assistant", "content": None, "refusal": "No.", "audio": None, "function_call": None}
    assert normalize_messages([refused]) == [{"role": "assistant", "content": "No."}]


@pytest.mark.parametrize("field", ["audio", "function_call"])
def test_what_the_model_would_not_see_is_refused(field: str) -> None:
    """Conversations of old clients have calls in `function_call`, and would be continued without them."""
    message = {"role": "assistant", "content": None, field: {"id": "x", "name": "f", "arguments": "{}"}}
    with pytest.raises(InvalidRequestError, match=rf"^messages\[0\].{field} is not supported"):
        normalize_messages([message])


def test_reasoning_is_renamed() -> None:
    for field in ("reasoning", "reasoning_content"):
        message = normalize_messages([{"role": "assistant", "content": "a", field: "why"}])[0]
        assert message["reasoning"] == message["reasoning_content"] == "why"


def test_tool_calls_become_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]
    assert message["tool_calls"][0] == {**call, "function": {"name": "f", "arguments": {"x": 1}}}
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (
        "tool_calls" not in normalize_messages([{"role": "assistant", "content": "", "tool_calls": None}])[0]
    )


LOOP = "{% for m in messages %}{% for call in m.tool_calls or [] %}"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("{{ call.function.arguments | tojson }}", '{"x": "é"}'),
        ("{{ call | tojson }}", '"arguments": {"x": "é"}}'),
        ("{% for key, value in call.function.arguments.items() %}<{{ key }}>{{ value }}{% endfor %}", "<x>é"),
        # These put the arguments into the text as they are: DeepSeek's, and the carelessly written ones.
        ("{{ '```json' + call['function']['arguments'] + '```' }}", '```json{"x": "é"}```'),
        ("{{ call.function.arguments }}", '{"x": "é"}'),
        # and this one takes both
        (
            "{% set a = call.function.arguments %}{{ a if a is string else a | tojson }}",
            '{"x": "é"}',
        ),
    ],
)
def test_every_template_shows_arguments_as_json(written: str, shown: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    talk = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = render(LOOP + written + "{% endfor %}{% endfor %}", normalize_messages(talk))
    assert shown in text and "{'x'" not in text


@pytest.mark.parametrize("arguments", ['{"a": "b', "[1]", "no JSON"])
@pytest.mark.parametrize(
    "written",
    [
        "{{ call.function.arguments | tojson }}",
        "{{ call.function.arguments }}",
        "{% for key, value in call.function.arguments.items() %}<{{ key }}>{{ value }}{% endfor %}",
    ],
)
def test_arguments_that_were_cut_off_do_not_end_the_conversation(written: str, arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = render(LOOP + written + "{% endfor %}{% endfor %}", normalize_messages(talk))
    assert arguments in text.replace('\\"', '"')
    with pytest.raises(InvalidRequestError, match="refused"):  # which stays what it is
        render("{{ raise_exception('no') }}", normalize_messages(talk))


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "fine"}, {"role": "user", "content": content}]


def calling(**call: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages must be a list"),
        ({}, "messages must be a list, got an object"),
        ("x", "messages must be a list, got a string"),
        ([], "messages must not be empty"),
        ([1], "messages[0] must be an object, got a number"),
        ([{}], "messages[0].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role must be a string, got a number"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        (user(None), "messages[1].content must be a string or a list of text parts, got nothing"),
        (user(1), "messages[1].content"),
        (user(True), "messages[1].content must be a string or a list of text parts, got a boolean"),
        (user({}), "messages[1].content"),
        (user([]), "messages[1].content must have"),
        (user(["x", 1]), "messages[1].content[1] must be a string or an object, got a number"),
        (user([None]), "messages[1].content[0] must be a string or an object, got nothing"),
        (user([{"text": "x"}]), "messages[1].content[0].type"),
        (user([{"type": "text"}]), "messages[1].content[0].text"),
        (user([{"type": "text", "text": 1}]), "messages[1].content[0].text"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "'image_url' is not supported"),
        (user([{"image_url": {"url": "x"}}]), "messages[1].content[0].type 'image_url' is not supported"),
        (user(["x", {"type": "input_audio", "input_audio": {}}]), "'input_audio' is not supported"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        ([{"role": "tool", "content": "x", "tool_call_id": []}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "content": "x", "reasoning": 1}], "messages[0].reasoning"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls[0] must be an object"),
        (calling(type="x"), "messages[0].tool_calls[0].type"),
        (calling(), "messages[0].tool_calls[0].function"),
        (calling(function={"name": 1}), "messages[0].tool_calls[0].function.name"),
        (calling(function={"name": "f", "arguments": [1]}), "arguments must be a JSON object, got a list"),
        (calling(id=1, function={"name": "f"}), "messages[0].tool_calls[0].id"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "more than 10000 messages"),
    ],
)
def test_malformed_messages_are_named(messages: Any, where: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        normalize_messages(messages)
    assert caught.value.param == "messages" and where in caught.value.message
    assert len(caught.value.message) < 300


def test_deep_nesting_is_answered_not_printed() -> None:
    deep: Any = "x"
    for _ in range(100_000):  # Python 3.13 takes 5000 of them
        deep = [deep]
    for messages in (deep, user(deep), user([{"type": "text", "text": deep}])):
        with pytest.raises(InvalidRequestError):
            normalize_messages(messages)
    with pytest.raises(InvalidRequestError):
        render("{{ messages | tojson }}", [{"role": "user", "content": "", "tool_calls": deep}])
