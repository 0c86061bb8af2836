"""Translates a `StructuredOutput` into llguidance's grammar, and checks that it compiles.

Runs in a child process, as the intersection of a few patterns may take minutes. llguidance is imported by the
functions that use it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar import json_schema
from microvllm.runtime.grammar.structural_tags import StructuralTags, literal, schemas_of_tags
from microvllm.runtime.process.children import serve
from microvllm.runtime.request import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

# Masks allow every token that fits, not only how the tokenizer would spell what is certain.
HEAD = '%llguidance {"no_forcing": true}\n'
STEPS = 8
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_CONTEXT = re.compile(r"\n(?:<state>| +\d+ \| )")  # lines of the grammar, and of the parser's state
_TREE_MARKS = re.compile(
    r"^[ \t]*[?!]+(?=[a-z_])", re.MULTILINE
)  # how Lark shapes trees, of which there are none
_CARET = re.compile(r"regex parse error:\n(?P<pattern>.*)\n(?P<indent> *)\^+\nerror: (?P<reason>[^\n]*)")


class Specials(msgspec.Struct, frozen=True):
    """What a grammar may say of the vocabulary: its size, and the special tokens' ids by their texts."""

    vocab_size: int
    ids: dict[str, int]


def parser_limits() -> LLParserLimits:
    """What a grammar may take: of the compiler, and of the mask of one token (about 20 ms each)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=20_000,  # an object with n optional properties takes 4 n
        step_max_items=200_000,
        max_lexer_states=50_000,  # of up to 2 kB
        verbose_errors=False,
    )


def translate(form: StructuredOutput, specials: Specials) -> str:
    """Return the form as a Lark grammar of llguidance's dialect. Raises `InvalidRequestError`."""
    kind, spec = form.kind, form.spec
    if kind in ("json", "json_object"):
        schema = _parse(spec) if kind == "json" else {"type": "object"}
        schema = json_schema.prepare(schema, form.whitespace, form.additional_properties)
        return f"{HEAD}start: %json {json.dumps(schema)}"
    if kind == "regex":
        from llguidance import regex_to_lark

        if not spec:
            raise InvalidRequestError("the pattern is empty")
        return f"{HEAD}start: /{regex_to_lark(spec, 'dws')}/"
    if kind == "choice":
        choices = _parse(spec)
        if not isinstance(choices, list) or not choices or not all(isinstance(item, str) for item in choices):
            raise InvalidRequestError("the choices must be a list of at least one string")
        return f"{HEAD}start: " + " | ".join(literal(text, {}) for text in dict.fromkeys(choices))
    if kind == "structural_tag":
        tags = StructuralTags(specials.ids, form.whitespace, form.additional_properties)
        return HEAD + tags.grammar(_parse(spec))
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    if not spec.strip():
        raise InvalidRequestError("the grammar is empty")
    try:
        return HEAD + any_to_lark(_TREE_MARKS.sub("", spec))
    except (GbnfToLarkError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the grammar is neither Lark's nor GBNF: {error}") from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The library's words for a rule that is missing: "Rule 'x' not found".
        raise InvalidRequestError(f"the grammar is no GBNF: {error}") from None


def check(form: StructuredOutput, specials: Specials) -> str:
    """Translate the form, compile it and go `STEPS` tokens into it; return the grammar.

    Raises `InvalidRequestError` with the reason, and the place if it is known.
    """
    from llguidance import LLMatcher

    grammar = translate(form, specials)
    matcher = LLMatcher(_bytes_tokenizer(specials), grammar, limits=parser_limits(), log_level=0)
    for _ in range(STEPS):  # where the states of a lexer explode, it is near the start
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(mask[specials.vocab_size : specials.vocab_size + 256])
        if matcher.is_error() or not len(allowed):
            break
        matcher.consume_token(specials.vocab_size + int(allowed[-1]))
    problem = matcher.get_error() or next(iter(matcher.get_grammar_warnings()), "")
    if problem:
        raise InvalidRequestError(_explain(form, problem))
    return grammar


def _parse(spec: str) -> Any:
    try:
        return json.loads(spec)
    except RecursionError:
        raise InvalidRequestError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequestError(f"not JSON: {error}") from None


def _explain(form: StructuredOutput, problem: str) -> str:
    """Return an error of llguidance in one line: the reason, then the place."""
    problem = _CONTEXT.split(problem)[0]
    place = _PLACE.match(problem)
    if place is not None:
        problem = problem[place.end() :].removeprefix("failed to compile JSON schema: ")
    caret = _CARET.search(problem)
    if caret is not None:
        where = len(caret["indent"]) - 3
        reason = f"invalid pattern {caret['pattern'].strip()!r:.200}: {caret['reason']} at character {where}"
    else:
        reason = problem.partition("\n")[0]
        if reason == "NoExtensionBias":  # llguidance's name for a grammar of which no output is finite
            reason = "no output ever ends, since it contains itself again"
    keywords = json_schema.unsupported(problem)
    if keywords:
        reason = f"{', '.join(keywords)} {'is' if len(keywords) == 1 else 'are'} not supported"
    if form.kind == "json":
        found = json_schema.locate(json.loads(form.spec), problem)
        return reason if found is None else f"{reason} (at {found})"
    if form.kind == "structural_tag":
        for begin, schema in schemas_of_tags(json.loads(form.spec)):
            found = json_schema.locate(schema, problem)
            if found is not None:
                return f"{reason} (at {found}{f', behind {begin!r:.200}' if begin else ''})"
    if form.kind == "grammar" and place is not None:
        return f"{reason} (at line {int(place[1]) - 1}, character {place[2]})"
    return reason


@functools.lru_cache(1)
def _tokenizer_of(vocab_size: int, ids: tuple[tuple[str, int], ...]) -> LLTokenizer:
    """A vocabulary of single bytes and the model's special tokens at their ids, to compile with."""
    from microvllm.runtime.grammar.vocabulary import make_tokenizer

    tokens = [b""] * (vocab_size + 257)
    for text, index in ids:
        tokens[index] = text.encode()
    for byte in range(256):
        tokens[vocab_size + byte] = bytes([byte])
    tokens[-1] = b"<end>"
    return make_tokenizer(tokens, [*dict(ids).values(), len(tokens) - 1], [len(tokens) - 1], slices=[])


def _bytes_tokenizer(specials: Specials) -> LLTokenizer:
    return _tokenizer_of(specials.vocab_size, tuple(sorted(specials.ids.items())))


# ---- in the child --------------------------------------------------------------------------------


def main() -> None:
    """Check forms for the parent."""
    serve(_prepare)


def _prepare(limits: Mapping[str, Any]) -> Callable[[dict[str, Any]], str]:
    import llguidance  # noqa: F401  # before the first question, whose time is limited

    def answer(question: dict[str, Any]) -> str:
        form = msgspec.convert(question["form"], StructuredOutput)
        return check(form, msgspec.convert(question["specials"], Specials))

    return answer
