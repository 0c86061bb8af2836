"""Forms are checked in processes that are killed at their deadline, and those that passed are kept."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fake_client import VOCAB_SIZE, FakeTokenizer

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar import checker as module
from microvllm.runtime.grammar.checker import GrammarChecker
from microvllm.runtime.request import StructuredOutput

# The intersection of these patterns takes hours.
EXPLOSIVE = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(30)]}
LETTERS = StructuredOutput(kind="regex", spec="[a-f]+", field="guided_regex")


def make(*, has_end: bool = True) -> GrammarChecker:
    return GrammarChecker(FakeTokenizer(), VOCAB_SIZE, has_end)  # type: ignore[arg-type]


def refusal(checker: GrammarChecker, form: StructuredOutput) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        checker.check(form)
    return caught.value


def test_an_explosive_schema_is_stopped_and_the_next_form_is_served() -> None:
    checker = make()
    checker.check(LETTERS)  # the processes start
    start = time.monotonic()
    error = refusal(
        checker, StructuredOutput(kind="json", spec=json.dumps(EXPLOSIVE), field="response_format")
    )
    assert time.monotonic() - start < 30 * module.DEADLINE_S
    assert error.param == "response_format" and "was still running after 2 s" in str(error)
    assert "[0-9]" in checker.check(StructuredOutput(kind="regex", spec="[0-9]"))


def test_a_form_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checker, asked = make(), []
    ask = checker._children.ask

    def counting(question: Any, seconds: float) -> Any:
        asked.append(question["form"]["spec"])
        return ask(question, seconds)

    monkeypatch.setattr(checker._children, "ask", counting)
    monkeypatch.setattr(module, "CACHED_FORMS", 2)
    broken = StructuredOutput(kind="regex", spec="(")
    for form in (LETTERS, StructuredOutput(kind="regex", spec="[a-f]+", after=[5], field="other")):
        checker.check(form)
    for _ in range(2):
        assert refusal(checker, broken).param == "structured_outputs"
    assert asked == ["[a-f]+", "("]
    checker.check(StructuredOutput(kind="regex", spec="x"))
    checker.check(LETTERS)
    assert asked == ["[a-f]+", "(", "x", "[a-f]+"] and len(checker._checked) == 2
    assert checker._chars == sum(len(key) + len(grammar) for key, (grammar, _) in checker._checked.items())


def test_what_needs_no_compiler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = make()
    monkeypatch.setattr(checker, "_ask", lambda form: pytest.fail("a process was asked"))
    long = StructuredOutput(kind="regex", spec="a" * (module.MAX_CHARS + 1))
    assert "the limit is 524288" in str(refusal(checker, long))
    for names in ("after", "opens", "head"):
        wrong = StructuredOutput(kind="json_object", **{names: [VOCAB_SIZE]})
        assert "out of vocabulary" in str(refusal(checker, wrong))
    assert "an end token" in str(refusal(make(has_end=False), LETTERS))
    tokenizer = FakeTokenizer()
    tokenizer.token_bytes = None
    without = GrammarChecker(tokenizer, VOCAB_SIZE, True)  # type: ignore[arg-type]
    error = refusal(without, LETTERS)
    assert "not available with this model's tokenizer" in str(error) and error.param == "guided_regex"
