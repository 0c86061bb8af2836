"""Holds the requests of `compare_vllm.py`, and the differences that are known and intended.

Every field of both endpoints with values that are right, at the border and wrong, alone in an otherwise plain
greedy request; prompts and messages of every form; the other endpoints; bodies that are no request at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
BIG = 2**63


@dataclass(frozen=True)
class Case:
    """One request. `random`: the two servers draw different tokens, so only the shape can be compared."""

    name: str
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    random: bool = False


@dataclass(frozen=True)
class Known:
    """A difference that is meant: cases and aspects it concerns, as patterns, and why it is there."""

    case: str
    aspect: str
    why: str

    def explains(self, case: str, aspect: str) -> bool:
        return bool(re.search(self.case, case) and re.search(self.aspect, aspect))


# Values beside which a sampled token is the only likely one are compared; the others are marked `random`.
COMMON: dict[str, list[Any]] = {
    "model": [None, "", "no-such-model", 1, ["m"]],
    "max_tokens": [1, 0, -1, "3", 3.0, 3.5, True, 2049, BIG, "x", []],
    "temperature": [None, 0, 1e-6, -0.1, 2, 2.1, "0", "x", True, [], 1e308],
    "top_p": [None, 1, 0.5, 1e-9, 0, -1, 1.1, "0.5", "x", []],
    "top_k": [None, 0, -1, -2, 1, 5, 10**6, BIG, 1.5, "1", "x"],
    "min_p": [None, 0, 0.5, 1, -0.1, 1.1, "x"],
    "n": [1, 0, -1, 2, 10**6, 20000, "1", 1.5, "x"],
    "seed": [None, 0, 42, -1, BIG - 1, BIG, -BIG - 1, 1.5, "7", "x"],
    "stop": [None, [], "Paris", ["Paris"], [" the", ","], [""], "", list("abcde"), list("abcd"), 1, [1]],
    "stop_token_ids": [None, [], [28], [0], [-1], [49152], [BIG], ["28"], ["x"], 28],
    "ignore_eos": [None, True, False, "true", 1, 2, "x"],
    "min_tokens": [None, 0, 3, 6, 7, -1, "3", 1.5, "x"],
    "include_stop_str_in_output": [True, None, "x"],
    "skip_special_tokens": [None, True, False, "x"],
    "spaces_between_special_tokens": [True, False, None, "x"],
    "presence_penalty": [None, 0, 1.5, 2, -2, 2.1, -2.1, "1", "x", []],
    "frequency_penalty": [None, 0, 1.5, 2, -2, 2.1, -2.1, "x"],
    "repetition_penalty": [None, 1, 1.5, 0.5, 0, -1, 1e30, "x"],
    "length_penalty": [1.0, 2.0, "x"],
    "logit_bias": [
        None,
        {},
        {"28": -100},
        {"28": 100},
        {"28": 1000},
        {"28": "x"},
        {"x": 1},
        {"49152": 1},
        {"-1": 1},
        [],
        "x",
    ],
    "allowed_token_ids": [None, [28, 29, 30], [], [49152], [-1], [BIG], ["28"], 28],
    "bad_words": [None, [], ["Paris"], [" Paris", "the"], [""], [1], "Paris", ["a"] * 129],
    "logprob_token_ids": [None, [], [28, 29], [49152], [-1], "x"],
    "return_tokens_as_token_ids": [None, True, False, "x"],
    "return_token_ids": [None, True, False, "x"],
    "repetition_detection": [
        None,
        {},
        {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3},
        {"max_pattern_size": -1},
        {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2},
        {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 1},
        1,
    ],
    "truncate_prompt_tokens": [None, -1, 0, 1, 3, 2048, 2049, -2, "3", "x"],
    "truncation_side": [None, "left", "right", "middle"],
    "stream_interval": [None, 1, 3, 0, -1, "x"],
    "stream_options": [None, {}, {"include_usage": True}, {"include_usage": "x"}, []],
    "echo": [None, True, False, "x"],
    "priority": [0, 1, -1, BIG - 1, BIG, "1", "x", None],
    "cache_salt": [None, "salt", "", "a" * 128, "a" * 129, "a/b", "a@b", "a\x00b", 1],
    "request_id": ["my-id", "", 1],
    "user": ["someone", 1, None],
    "metadata": [{}, {"a": "b"}],
    "store": [True, False],
    "service_tier": ["auto", "x"],
    "best_of": [1, 2],
    "use_beam_search": [False, "x"],
    "response_format": [None, {"type": "text"}, {"type": "x"}, {}, "x"],
    "guided_json": [{"type": "object"}],
    "vllm_xargs": [None, {}, {"a": 1}, "x"],
    "thinking_token_budget": [None, -2],
    "no_such_field": [1, None, {"a": []}],
    "add_special_tokens": [None, True, False, "x"],
    "stream": [None, False, "false", "x"],
    "session_id": ["s", None],
    "watermarking": [None],
    "kv_transfer_params": [None],
}
ONLY_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [
        None,
        "",
        [],
        [""],
        [TEXT, "Hello"],
        [504, 3575],
        [[504, 3575], [504]],
        [[]],
        [-1],
        [49151],
        [49152],
        [BIG],
        [[BIG]],
        [1.5],
        [True],
        [None],
        ["a", [1]],
        [["a"]],
        {},
        1,
        True,
        "a\x00b",
        "\u00e9\u4e16\U0001f600",
        "word " * 4000,
        "a" * 100_000,
        [1] * 2047,
        [1] * 2048,
        [1] * 2049,
        ["a"] * 1025,
    ],
    "logprobs": [None, 0, 1, 5, 20, 21, -1, -2, True, "2", "x"],
    "prompt_logprobs": [None, 0, 1, 3, -1, -2, 21, "x"],
    "suffix": [None, "", "abc", 1],
    "prompt_embeds": [None],
}
ONLY_CHAT: dict[str, list[Any]] = {
    "messages": [
        None,
        [],
        {},
        "x",
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": {}}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "nope", "text": "Hi"}]}],
        [{"role": "user", "content": ["Hi"]}],
        [{"content": "Hi"}],
        [{"role": 1, "content": "Hi"}],
        [{"role": "wizard", "content": "Hi"}],
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "assistant", "content": None}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi", "name": "bob"}],
        [{"role": "user", "content": "Hi", "name": 1}],
        [{"role": "user", "content": "Hi", "extra": {"a": 1}}],
        [{"role": "user", "content": "a\x00b"}],
        [{"role": "user", "content": "word " * 4000}],
    ],
    "max_completion_tokens": [None, 1, 3, 0, -1, 2049, BIG, "x"],
    "logprobs": [None, True, False, "x", 5],
    "top_logprobs": [None, 0, 5, 20, 21, -1, -2, "x"],
    "prompt_logprobs": [None, 0, 1, -1, -2, 21, "x"],
    "add_generation_prompt": [None, True, False, "x"],
    "continue_final_message": [None, True, False, "x"],
    "chat_template": [None, "{{ messages }}", 1],
    "chat_template_kwargs": [None, {}, {"enable_thinking": False}, {"tokenize": True}, [], "x"],
    "documents": [None, []],
    "reasoning_effort": [None, "low", "none", "x"],
    "include_reasoning": [None, True, False, "x"],
    "return_prompt_text": [None, True, False],
    "parallel_tool_calls": [None, True, False],
    "tools": [None, [], "x", [{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": [None, "none", "auto", "required", "x"],
    "modalities": [["text"]],
}
# Fields that mean something only together, as bodies of both endpoints.
TOGETHER: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0, "seed": 1, "top_p": 0.9, "top_k": 50},
    "n=3": {"temperature": 1.0, "seed": 1, "n": 3},
    "one likely token": {"temperature": 1.0, "top_k": 1},
    "tiny top_p": {"temperature": 1.5, "top_p": 1e-9},
    "stop kept": {"stop": [" the", "."], "include_stop_str_in_output": True},
    "stop token kept": {"stop_token_ids": [28, 30], "include_stop_str_in_output": True},
    "stop token": {"stop_token_ids": [28, 30], "max_tokens": 16},
    "min over max": {"min_tokens": 9, "max_tokens": 8},
    "min tokens and stop": {"min_tokens": 5, "max_tokens": 12, "stop": ["a"]},
    "bias that forces": {"logit_bias": {"28": 100}, "max_tokens": 3},
    "all penalties": {
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "max_tokens": 12,
    },
    "one allowed token": {"allowed_token_ids": [28], "max_tokens": 4},
    "repetition": {
        "allowed_token_ids": [28],
        "max_tokens": 30,
        "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4},
    },
    "long prompt and max_tokens": {"max_tokens": 2048, "stop_token_ids": [28, 29, 30, 198]},
    "truncated left": {"truncate_prompt_tokens": 3, "truncation_side": "left", "return_token_ids": True},
    "truncated right": {"truncate_prompt_tokens": 3, "truncation_side": "right", "return_token_ids": True},
    "sampled twice greedily": {"n": 2},
    "two wrong fields": {"temperature": "x", "top_p": "y"},
    "stream_options alone": {"stream_options": {"include_usage": True}},
}
TOGETHER_COMPLETIONS: dict[str, dict[str, Any]] = {
    "echo": {"echo": True, "logprobs": 2},
    "echo alone": {"echo": True, "max_tokens": 0},
    "echo alone with logprobs": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "logprobs as ids": {"logprobs": 2, "return_tokens_as_token_ids": True},
    "logprobs of given tokens": {"logprobs": 1, "logprob_token_ids": [28, 29, 30]},
    "two prompts": {"prompt": [TEXT, "Hello, my name is"], "return_token_ids": True},
    "two prompts of ids": {"prompt": [[504, 3575], [504, 3575, 282]], "logprobs": 1},
    "prompt logprobs and echo": {"prompt_logprobs": 2, "echo": True},
    "no special tokens": {"add_special_tokens": False, "return_token_ids": True},
    "split character": {"prompt": "Emoji: \U0001f600\U0001f601\U0001f602", "max_tokens": 16, "logprobs": 1},
}
TOGETHER_CHAT: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "logprobs of the token alone": {"logprobs": True},
    "logprobs as ids": {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True},
    "logprobs of given tokens": {"logprobs": True, "logprob_token_ids": [28, 29, 30]},
    "too many top_logprobs": {"logprobs": True, "top_logprobs": 21},
    "prompt logprobs": {"prompt_logprobs": 1, "logprobs": True, "top_logprobs": 1},
    "both limits": {"max_tokens": 3, "max_completion_tokens": 5},
    "continued": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Red, green"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "continued with echo": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Red, green"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "echo": True,
    },
    "both turn flags": {"continue_final_message": True, "add_generation_prompt": True},
    "no generation prompt": {"add_generation_prompt": False},
    "tool_choice without tools": {"tool_choice": "auto"},
}
# Streamed with and without counts, beside the whole answer.
STREAMED = ("logprobs", "echo", "n=3", "stop kept", "stop token", "two prompts", "continued with echo")
BAD_BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "overflow": b'{"prompt": "a", "temperature": 1e999}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "a key twice": b'{"prompt": "a", "prompt": "b", "max_tokens": 2, "temperature": 0}',
}
TOKENIZE: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": TEXT},
    "prompt without special tokens": {"prompt": TEXT, "add_special_tokens": False},
    "prompt with names": {"prompt": "h\u00e9llo w\u00f6rld", "return_token_strs": True},
    "empty prompt": {"prompt": ""},
    "long prompt": {"prompt": "word " * 4000},
    "messages": {"messages": MESSAGES},
    "messages with special tokens": {"messages": MESSAGES, "add_special_tokens": True},
    "messages without generation prompt": {"messages": MESSAGES, "add_generation_prompt": False},
    "messages continued": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Red"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "both turn flags": {
        "messages": MESSAGES,
        "add_generation_prompt": True,
        "continue_final_message": True,
    },
    "nothing": {},
    "both": {"prompt": TEXT, "messages": MESSAGES},
    "null": {"prompt": None},
    "number": {"prompt": 1},
    "list": {"prompt": []},
    "unknown model": {"prompt": TEXT, "model": "no-such-model"},
    "unknown field": {"prompt": TEXT, "nope": 1},
}
DETOKENIZE: dict[str, dict[str, Any]] = {
    "ids": {"tokens": [504, 3575, 282]},
    "special ids": {"tokens": [1, 504, 2]},
    "no ids": {"tokens": []},
    "negative": {"tokens": [-1]},
    "beyond the vocabulary": {"tokens": [49152]},
    "huge": {"tokens": [BIG]},
    "text": {"tokens": ["x"]},
    "numeric text": {"tokens": ["504"]},
    "missing": {},
    "not a list": {"tokens": 5},
    "unknown model": {"tokens": [504], "model": "no-such-model"},
}


def cases(model: str) -> Iterator[Case]:
    """All of them; `model` is the name that both servers serve."""
    yield from _plain()
    for path, base, extra, together in (
        (COMPLETIONS, {"prompt": TEXT}, ONLY_COMPLETIONS, TOGETHER_COMPLETIONS),
        (CHAT, {"messages": MESSAGES}, ONLY_CHAT, TOGETHER_CHAT),
    ):
        base = {"model": model, "max_tokens": 6, "temperature": 0, **base}
        kind = path.split("/")[2]
        yield from _bodies(kind, path, base)
        for name, values in {**COMMON, **extra}.items():
            for value in values:
                # Too long an answer tells nothing more; without `temperature` tokens are drawn.
                drawn = name == "temperature" and value in (None, 2, 2.0) and value is not False
                yield _post(f"{kind} {name}={_short(value)}", path, {**base, name: value}, random=drawn)
        for name, changes in {**TOGETHER, **together}.items():
            drawn = changes.get("temperature") == 1.0 and "seed" in changes
            body = {**base, **changes}
            yield _post(f"{kind} {name}", path, body, random=drawn)
            if name in STREAMED:
                yield from _streams(f"{kind} {name}", path, body, drawn)
        yield from _streams(kind, path, base, drawn=False)
        ids = {"return_token_ids": True, "stream": True}
        yield _post(f"{kind} streamed return_token_ids", path, {**base, **ids})
        yield _post(f"{kind} streamed bad value", path, {**base, "stream": True, "temperature": 9})
        yield _post(f"{kind} streamed unknown model", path, {**base, "stream": True, "model": "nope"})
        yield _post(f"{kind} streamed stop id", path, {**base, "stream": True, "stop_token_ids": [49152]})
        for header in ("X-Request-Id", "X-Vllm-Priority", "X-Session-ID"):
            for value in ("1", "abc"):
                yield _post(f"{kind} header {header}: {value}", path, base, {header: value})
    for path, bodies in (("/tokenize", TOKENIZE), ("/detokenize", DETOKENIZE)):
        for name, body in bodies.items():
            yield _post(f"{path[1:]} {name}", path, body)


def _plain() -> Iterator[Case]:
    for path in ("/health", "/ping", "/version", "/load", "/v1/models", "/metrics", "/openapi.json", "/docs"):
        yield Case(f"GET {path}", "GET", path, headers={})
    for path in (
        "/",
        "/nope",
        "/v1",
        "/v1/nope",
        "//v1/models",
        "/v1/models/x",
        "/v1/embeddings",
        "/V1/models",
    ):
        yield Case(f"GET {path}", "GET", path, headers={})
    for path in ("/server_info", "/reset_prefix_cache", "/is_sleeping", "/start_profile", "/tokenizer_info"):
        yield Case(f"GET {path}", "GET", path, headers={})
        yield Case(f"POST {path}", "POST", path, headers={})
    for path in ("/v1/models", "/health", "/version", "/metrics"):
        yield Case(f"POST {path}", "POST", path, headers={})
    yield Case("POST /ping", "POST", "/ping", headers={})
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
            yield Case(f"{method} {path}", method, path, headers={})


def _bodies(kind: str, path: str, base: dict[str, Any]) -> Iterator[Case]:
    for name, data in BAD_BODIES.items():
        yield Case(f"{kind} body: {name}", "POST", path, data)
    good = json.dumps(base).encode()
    for media_type in (
        "",
        "text/plain",
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/x",
    ):
        headers = {"content-type": media_type} if media_type else {}
        yield Case(f"{kind} content-type {media_type!r}", "POST", path, good, headers)


def _streams(name: str, path: str, body: dict[str, Any], drawn: bool) -> Iterator[Case]:
    for options in (None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        streamed = {**body, "stream": True} | ({} if options is None else {"stream_options": options})
        yield _post(f"{name} streamed {_short(options)}", path, streamed, random=drawn)


def _post(
    name: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None, random: bool = False
) -> Case:
    headers = {"content-type": "application/json", **(headers or {})}
    return Case(name, "POST", path, json.dumps(body).encode(), headers, random)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:50]}...({len(text)})"


# The first that explains a difference is shown. What is said here is said in docs/http.md, too.
KNOWN = (
    Known(
        "",
        r"weight_versions: only ours|kv_transfer_params: only ours|completion_tokens_details: only theirs",
        "vLLM 0.33 answers as we do; the 0.32 that was compared does not know the member, or knows one more",
    ),
    Known(
        "continue_final_message=true", r"^status 200 / 400", "vLLM 0.33 answers as we do: only both are wrong"
    ),
    Known("bad_words=.*x?129|bad_words=.*\\(645\\)", r"^status 400 / 200", "vLLM 0.33 has our limit of 128"),
    Known("repetition", "stop_reason", "vLLM 0.33 answers as we do"),
    Known("=null$", r"^status 200 / 400", "null means `not given` for every field"),
    Known(
        r"(user|logprobs|suffix|service_tier)=",
        r"^status 200 / 400",
        "a field that is ignored takes any value, a number may be a numeric string, an empty suffix is none",
    ),
    Known(
        "=true$|=\\[true\\]$|top_k=9223372036854775808",
        r"^status 400 / 200",
        "a boolean is no number, and numbers have 64 bits",
    ),
    Known(
        "best_of|guided_json|vllm_xargs|documents|length_penalty=2|chat_template_kwargs",
        r"^status 400 / 200",
        "what is not implemented is refused; vLLM ignores it",
    ),
    Known(
        "request_id=",
        r"^status 400 / 200",
        "an id is 1 to 128 letters, digits, '.', '_' or '-'",
    ),
    Known("chat messages=", r"^status 400 / 200", "a user's message has a content"),
    Known(
        "streamed stop id",
        r"^status 400 / 200",
        "refused with a 400 before the stream, not by an event in it",
    ),
    Known(
        "X-Vllm-Priority: abc", r"^status 400 / 200", "a priority that is no number is refused, not ignored"
    ),
    Known("^tokenize both", r"^status 400 / 200", "a prompt and messages together are refused"),
    Known("^detokenize beyond", r"^status 400 / 200", "ids out of the vocabulary are refused"),
    Known("byte order mark", "", "JSON has no byte order mark"),
    Known("no UTF-8", "", "a body that is no UTF-8 is answered with the usual error object"),
    Known("^GET /$", "", "the chat page; vLLM has nothing there"),
    Known("POST /metrics", "", "/metrics answers GET alone"),
    Known("", "header allow", "HEAD is allowed wherever GET is"),
    Known("/v1/models", "owned_by", "owned by microvllm"),
    Known(
        "/metrics",
        r"_created: |estimated_|external_prefix_cache|mm_cache|sleep_state|cache_config_info",
        "no metrics of parts that we do not have (image cache, other hosts), no estimates, no `_created`",
    ),
    Known(
        "",
        r"error\.param: \"[\w.]+\" / null",
        "`param` names the field at fault where vLLM leaves it null",
    ),
    Known(
        "",
        r"error\.(type|param): ",
        "`type` and `param` tell whether a value's form was refused (Bad Request, body.x) or its size "
        "(BadRequestError, x); vLLM draws that line elsewhere for some fields, and names places inside lists",
    ),
    Known(
        "echo alone",
        "usage",
        "nothing was generated, so nothing is counted; vLLM counts a token of its engine",
    ),
    Known("echo streamed", "prompt_token_ids", "the ids of the prompt come with return_token_ids alone"),
    Known(
        "chat .*echo", "prompt_logprobs", "`echo` in a chat does not ask for log probabilities of the prompt"
    ),
    Known("logprobs as ids", "bytes", "`bytes` are those of the token, not of its number"),
    Known("split character", "text", "an unfinished last character is shown as U+FFFD; vLLM drops it"),
)
