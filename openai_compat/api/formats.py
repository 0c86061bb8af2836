"""Finds the formats in which a server's model writes calls and reasoning, and their token ids."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from microvllm.openai_compat.parsers.output import Thinking
from microvllm.openai_compat.parsers.registry import AUTO, REASONING_FORMATS, detect_formats, tokens_of
from microvllm.runtime.options.flag import given_flags

if TYPE_CHECKING:
    from microvllm.openai_compat.config import AnswerArgs, ServerArgs
    from microvllm.runtime.process.client import EngineClient
    from microvllm.runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("microvllm.server")

TEXT_OPTIONS = (
    *("reasoning_effort_map", "response_role", "max_stop_strings", "enable_auto_tool_choice"),
    *("tool_call_parser", "reasoning_parser", "exclude_tools_when_tool_choice_none"),
    *("return_tokens_as_token_ids", "enable_per_request_metrics", "fingerprint_mode", "stream_interval"),
    *("sse_keep_alive_interval", "enable_force_include_usage", "max_response_store_bytes"),
)

MAX_BLANK = 512  # tokens of white space that are known as such
# What may stand around a tag: beside some of these, one that is no token of its own is spelt differently.
IN_FRONT, BEHIND = ("", "a", " ", "\n", ".", '"'), ("", "a", " ", "\n", "{", ">")


def warn_of_options(client: EngineClient, args: ServerArgs) -> None:
    """Log that options name what the chat template was not written for, or have no effect on the model."""
    if client.config.spec.pooling is not None and (given := given_flags(args, TEXT_OPTIONS)):
        logger.warning("%s: no effect on a model that makes vectors", ", ".join(given))
        return
    processor, calls = client.processor, args.tool_call_parser
    if calls not in (None, AUTO) and "tools" not in processor.template_source:
        logger.warning("--tool-call-parser %s: the chat template does not show tools to the model", calls)
    template, form = processor.template, args.chat_template_content_format
    if template is not None and form not in (AUTO, template.content_format):
        logger.warning(
            "--chat-template-content-format %s: the chat template seems to be written for %s",
            *(form, template.content_format),
        )


@dataclass(frozen=True)
class ThinkingIds:
    """Token ids: the tags around the reasoning, and the texts that the answer and a call begin behind.

    `plain`: the text that an answer without reasoning begins behind. `blank`: tokens of white space.
    """

    start: list[int]
    end: list[int]
    answer: list[int]
    call: list[int]
    plain: list[int]
    blank: list[int]

    @classmethod
    def of(cls, thinking: Thinking, tokenizer: Tokenizer) -> ThinkingIds | None:
        """Return the ids of a format; None if the tokenizer has several spellings of a tag."""
        encode = functools.lru_cache(None)(lambda text: tokenizer.encode(text, False))
        end = thinking.end
        tags = (thinking.start, end, thinking.answer or end, thinking.call or end, thinking.plain)
        for tag in filter(None, dict.fromkeys(tags)):
            for front in IN_FRONT:
                for behind in BEHIND:
                    if encode(front + tag + behind) != encode(front) + encode(tag) + encode(behind):
                        return None
        table = tokenizer.token_bytes
        blank = (index for index, text in enumerate(table.all if table else ()) if text.isspace())
        start, closing, answer, call, plain = (encode(tag) if tag else [] for tag in tags)
        return cls(start, closing, answer, call, plain, [*islice(blank, MAX_BLANK)])


@dataclass(frozen=True)
class Formats:
    """The formats of calls and of reasoning, by name; None where there is none.

    `ids` are those of the reasoning's tags, None if the tokenizer has several spellings of one. `special` are
    the texts of special tokens, which are usually no part of the output's text.
    """

    calls: str | None = None
    reasoning: str | None = None
    ids: ThinkingIds | None = None
    special: frozenset[str] = frozenset()

    @classmethod
    def of(cls, client: EngineClient, args: AnswerArgs) -> Formats:
        """Return the formats that the options name, or for `auto` the chat template shows."""
        calls, reasoning = args.tool_call_parser, args.reasoning_parser
        source = client.processor.template_source
        if AUTO in (calls, reasoning):
            shown = detect_formats(source)
            calls = shown[0] if calls == AUTO else calls
            reasoning = shown[1] if reasoning == AUTO else reasoning
        ids = None if reasoning is None else ThinkingIds.of(REASONING_FORMATS[reasoning], client.tokenizer)
        tokens = map(client.tokenizer.id_to_token, client.tokenizer.special_ids)
        return cls(calls, reasoning, ids, frozenset(filter(None, tokens)))

    def in_special_tokens(self, *, calls: bool) -> bool:
        """Whether special tokens mark the reasoning, or the calls if there may be some."""
        return not self.special.isdisjoint(tokens_of(self.calls if calls else None, self.reasoning))

    @property
    def thinking(self) -> Thinking | None:
        return None if self.reasoning is None else REASONING_FORMATS[self.reasoning]
