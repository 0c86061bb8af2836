"""Grammars in the engine: every way in which a request may run, and what it does to the others."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from llguidance import LLParserLimits
from model_tools import make_engine, variant_folder
from random_outputs import faults

from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.grammar.checker import GrammarChecker
from microvllm.runtime.grammar.masks import GrammarMasks, Group, Row
from microvllm.runtime.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    StepOutput,
    StructuredOutput,
    ThinkingBudget,
)
from microvllm.runtime.worker.bitmask import take_out
from microvllm.runtime.worker.device import Replay

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
PERSON = StructuredOutput(kind="json", spec=json.dumps(SCHEMA), whitespace="")
LETTERS = StructuredOutput(kind="regex", spec="[a-f]{12}")
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checker() -> GrammarChecker:
    """One for all engines of this file: it has child processes."""
    engine = make_engine(variant_folder("llama-tied"))
    return GrammarChecker(engine.tokenizer, engine.config.spec.vocab_size, True)


def engine_with(checker: GrammarChecker, **options: Any) -> InferenceEngine:
    engine = make_engine(variant_folder("llama-tied"), **options)
    engine.processor._grammars = checker
    return engine


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, checker: GrammarChecker) -> InferenceEngine:
    return engine_with(checker, async_scheduling=request.param)


def requests(
    engine: InferenceEngine, form: StructuredOutput | None, *, prompt: Sequence[int] = PROMPT, **params: Any
) -> list[EngineRequest]:
    fields = {"max_tokens": 120, "seed": 3, **params}
    return engine.processor.requests(list(prompt), SamplingParams(structured_outputs=form, **fields))


def run(core: EngineCore[Any], wanted: Sequence[EngineRequest]) -> dict[int, list[StepOutput]]:
    """The outputs of each request."""
    outputs: dict[int, list[StepOutput]] = {request.request_id: [] for request in wanted}
    for output in core.add_samples(wanted):
        outputs[output.request_id].append(output)
    while core.has_work():
        for output in core.step():
            outputs[output.request_id].append(output)
    return outputs


def text_of(engine: InferenceEngine, outputs: Sequence[StepOutput]) -> str:
    return engine.tokenizer.decode([token for output in outputs for token in output.token_ids])


def generate(engine: InferenceEngine, wanted: Sequence[EngineRequest]) -> list[tuple[str, StepOutput]]:
    """The text of each request and its last output; requests of different prompts are added apart."""
    outputs: dict[int, list[StepOutput]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.core.add_samples([request])
    while engine.core.has_work():
        for output in engine.core.step():
            outputs[output.request_id].append(output)
    return [(text_of(engine, outputs[r.request_id]), outputs[r.request_id][-1]) for r in wanted]


def check_person(text: str) -> None:
    assert not faults(SCHEMA, text.encode()), text


# ---- what comes out --------------------------------------------------------------------------------


def test_constrained_and_free_requests_in_one_batch(engine: InferenceEngine) -> None:
    free = [request for i in range(3) for request in requests(engine, None, prompt=[9, i], ignore_eos=True)]
    alone = generate(engine, free)
    people = [request for i in range(4) for request in requests(engine, PERSON, prompt=[5, i], seed=i)]
    free = [request for i in range(3) for request in requests(engine, None, prompt=[9, i], ignore_eos=True)]
    together = generate(engine, [*people, *free])
    for text, last in together[:4]:
        check_person(text)
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)
    assert [text for text, _ in together[4:]] == [text for text, _ in alone]
    assert len({text for text, _ in together[:4]}) == 4


def test_asynchronous_scheduling_changes_no_token(checker: GrammarChecker) -> None:
    engines = [engine_with(checker, async_scheduling=choice) for choice in (False, True)]
    texts = []
    for engine in engines:
        wanted = [
            r for i in range(5) for r in requests(engine, PERSON if i % 2 else None, prompt=[5, i], seed=i)
        ]
        texts.append([text for text, _ in generate(engine, wanted)])
    assert texts[0] == texts[1]


def test_tokens_that_a_device_chooses_by_masks_alone(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does in a graph, which takes the masks when the logits are there."""

    def texts() -> list[str]:
        wanted = [
            request
            for i in range(6)
            for request in requests(
                engine, PERSON if i % 3 else None, prompt=[5, i], temperature=0.0, ignore_eos=not i % 3
            )
        ]
        return [text for text, _ in generate(engine, wanted)]

    expected = texts()
    runner: Any = engine.core._runner
    device, replays = runner._device, list[int]()

    def replay(items: Sequence[Any]) -> Replay | None:
        rows = [item.request.row for item in items]
        if any(item.num_new > 1 for item in items) or not runner.masks.concerns(rows):
            return None
        ids, hidden = device.forward(items, runner._block_tables)
        logits = runner.model.logits(hidden)

        def choose(at: Sequence[int], bits: Sequence[np.ndarray]) -> Any:
            replays.append(len(at))
            take_out(logits, at, bits)
            tokens = logits.argmax(-1)
            device.inputs.set_newest(rows, tokens)
            return tokens.tolist

        return Replay(ids, logits, None, choose)

    monkeypatch.setattr(device, "replay", replay)
    assert texts() == expected
    assert max(replays) == 4


def test_after_a_preemption_and_with_hits_of_the_prefix_cache(checker: GrammarChecker) -> None:
    """So few blocks that requests are preempted in the middle of their form."""
    for choice in (False, True):
        roomy = engine_with(checker, async_scheduling=choice)
        wanted = [
            r for i in range(6) for r in requests(roomy, PERSON, prompt=[7] * 20, seed=i, temperature=2.0)
        ]
        expected = [text for text, _ in generate(roomy, wanted)]
        tight = engine_with(
            checker, async_scheduling=choice, num_gpu_blocks_override=12, block_size=8, max_model_len=90
        )
        wanted = [
            r
            for i in range(6)
            for r in requests(tight, PERSON, prompt=[7] * 20, seed=i, temperature=2.0, max_tokens=70)
        ]
        assert [text for text, _ in generate(tight, wanted)] == expected
        assert tight.core.stats().preemptions > 0 and tight.core.stats().prefix_hits > 0


def test_several_samples_of_one_prompt(engine: InferenceEngine) -> None:
    wanted = requests(engine, PERSON, n=4)
    outputs = run(engine.core, wanted)
    texts = [text_of(engine, outputs[request.request_id]) for request in wanted]
    for text in texts:
        check_person(text)
    assert len(set(texts)) > 1


def test_a_length_cuts_the_form(engine: InferenceEngine) -> None:
    ((text, last),) = generate(engine, requests(engine, LETTERS, max_tokens=3, ignore_eos=True))
    assert last.finish_reason is FinishReason.LENGTH and 0 < len(text) < 12 and set(text) <= set("abcdef")


def test_the_end_is_an_end_token_also_when_it_is_ignored(engine: InferenceEngine) -> None:
    choice = StructuredOutput(kind="choice", spec='["ab"]')
    outputs = run(engine.core, wanted := requests(engine, choice, max_tokens=9, ignore_eos=True))
    tokens = [token for output in outputs[wanted[0].request_id] for token in output.token_ids]
    assert engine.tokenizer.decode(tokens) == "ab" and len(tokens) == 9
    assert set(tokens[2:]) == {engine.tokenizer.eos_token_id}


def test_min_tokens_lengthen_an_output_and_fail_where_they_cannot(engine: InferenceEngine) -> None:
    several = StructuredOutput(kind="regex", spec="a+")
    ((text, _),) = generate(engine, requests(engine, several, min_tokens=20, logit_bias={}, max_tokens=60))
    assert len(text) >= 20
    (good, bad) = generate(
        engine, [*requests(engine, PERSON), *requests(engine, LETTERS, prompt=[8], min_tokens=40)]
    )
    check_person(good[0])
    assert bad[1].finish_reason is FinishReason.ERROR and bad[1].param == "structured_outputs"
    assert "min_tokens" in str(bad[1].error)


def test_stop_tokens_and_log_probabilities(engine: InferenceEngine) -> None:
    stop = engine.tokenizer.encode("c", False)
    outputs = run(engine.core, wanted := requests(engine, LETTERS, stop_token_ids=stop, logprobs=5))
    outputs_of = outputs[wanted[0].request_id]
    last = outputs_of[-1]
    assert last.finish_reason is FinishReason.STOP and (
        last.stop_reason == stop[0] or last.stop_reason is None
    )
    entries = [entry for output in outputs_of for entry in output.logprobs or ()]
    assert entries and all(len(entry.token_ids) == 6 for entry in entries)
    outside = {token for entry in entries for token in entry.token_ids[1:]}
    assert any(not set(engine.tokenizer.decode([token])) <= set("abcdef") for token in outside), (
        "of the model"
    )


def test_processed_log_probabilities_show_the_mask(checker: GrammarChecker) -> None:
    engine = engine_with(checker, logprobs_mode="processed_logprobs")
    outputs = run(
        engine.core, wanted := requests(engine, StructuredOutput(kind="choice", spec='["ab"]'), logprobs=2)
    )
    first = (outputs[wanted[0].request_id][0].logprobs or [])[0]
    assert first.logprobs[1] > -1e-6 or first.logprobs[2] > -np.inf


# ---- reasoning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 9])
def test_the_form_begins_behind_a_reasoning_that_is_cut(engine: InferenceEngine, budget: int) -> None:
    """The forced end of the reasoning is the end that the form waits for."""
    end = [40, 41]
    form = StructuredOutput(kind="regex", spec="[a-f]{12}", after=end)
    thinking = ThinkingBudget(max_tokens=budget, end=end)
    wanted = requests(engine, form, thinking=thinking, logit_bias={40: -100})
    (outputs,) = run(engine.core, wanted).values()
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens[budget : budget + 2] == end and outputs[-1].finish_reason is FinishReason.STOP
    assert re.fullmatch("[a-f]{12}", engine.tokenizer.decode(tokens[budget + 2 :]))


@pytest.mark.parametrize("after", [[40], [40, 41], [40, 40, 41]])
def test_the_form_begins_behind_the_reasoning(engine: InferenceEngine, after: list[int]) -> None:
    """The reasoning is as it would be, up to the tokens that end it; the form follows at once."""
    form = StructuredOutput(kind="regex", spec="[a-f]{12}", after=after)
    bias = dict.fromkeys(after, 14.0)
    wanted = requests(engine, form, logit_bias=bias, max_tokens=200, seed=5, ignore_eos=False)
    outputs = run(engine.core, wanted)
    tokens = [token for output in outputs[wanted[0].request_id] for token in output.token_ids]
    ends = [i for i in range(len(tokens)) if tokens[i : i + len(after)] == after]
    assert ends, "the reasoning did not end"
    answer = engine.tokenizer.decode(tokens[ends[0] + len(after) :])
    assert len(answer) == 12 and set(answer) <= set("abcdef")


def test_an_output_that_opens_no_reasoning_has_the_form_from_its_start(engine: InferenceEngine) -> None:
    opens, after = [50, 51], [40]
    form = StructuredOutput(kind="regex", spec="[a-f]{12}", after=after, opens=opens)
    ((text, _),) = generate(engine, requests(engine, form, logit_bias={50: -100.0}))
    assert len(text) == 12 and set(text) <= set("abcdef")
    bias = dict.fromkeys([*opens, *after], 14.0)
    outputs = run(engine.core, wanted := requests(engine, form, logit_bias=bias, max_tokens=200))
    tokens = [token for output in outputs[wanted[0].request_id] for token in output.token_ids]
    assert tokens[:2] == opens
    answer = engine.tokenizer.decode(tokens[tokens.index(40) + 1 :])
    assert len(answer) == 12 and set(answer) <= set("abcdef")


@pytest.mark.parametrize("head", [[], [0], [0, 2]], ids=str)
def test_an_output_may_begin_as_reasoning_and_as_the_form_at_once(
    engine: InferenceEngine, checker: GrammarChecker, head: list[int]
) -> None:
    """`opens` begins with a letter of the form, or as `head` does; each next token is checked with a set."""
    a, b, x = (engine.tokenizer.encode(each, False)[-1] for each in "abx")
    assert len({a, b, x}) == 3
    head, end = [[a, x, b][i] for i in head], 40
    form = StructuredOutput(kind="regex", spec="ab[ab]", after=[end], opens=[a, x], head=head)
    grammar, masks = checker.check(form), engine.core._masks
    assert isinstance(masks, GrammarMasks)

    def row(*tokens: int) -> Row:
        made = Row(form, lambda: masks._compiled._make(grammar), engine.config.spec.vocab_size)
        made.advance([])
        for token in tokens:
            made.advance([token])
        return made

    def allowed(*tokens: int) -> set[int] | None:
        mask = row(*tokens).mask(len(tokens))
        if mask is None:
            return None
        found = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return set(found.tolist()) & {a, b, x, end}

    first = [*head, a, b, a]
    for i in range(3 + len(head)):
        others = {x} if first[:i] == [a] else set()  # still about to open the reasoning
        letters = {first[i]} if i < len(head) + 2 else {a, b}
        assert allowed(*first[:i]) == letters | others | ({a} if i == 0 else set())
    for reasoning in ([], [b], [a, b, x, 7]):
        assert allowed(a, x, *reasoning) is None
        assert [allowed(a, x, *reasoning, end, *[a, b][:i]) for i in range(3)] == [{a}, {b}, {a, b}]
    assert row(a, end).problem and row(b).problem


# ---- failures --------------------------------------------------------------------------------------


def test_a_form_that_explodes_fails_alone(engine: InferenceEngine) -> None:
    """Its first states are harmless, so that the check before the queue cannot see it."""
    explosive = StructuredOutput(kind="regex", spec="(?:a?){9000}a{9000}", field="guided_regex")
    good, bad = generate(
        engine, [*requests(engine, PERSON), *requests(engine, explosive, prompt=[8], max_tokens=400)]
    )
    check_person(good[0])
    assert bad[1].finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
    if bad[1].finish_reason is FinishReason.ERROR:
        assert bad[1].param == "guided_regex" and "guided_regex" in str(bad[1].error)


def test_an_exhausted_lexer_fails_no_later_request(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests of a grammar share the states that its lexer may have, and each may find new ones."""
    limits = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.parser_limits", lambda: limits)
    engine = engine_with(checker)
    form = StructuredOutput(kind="regex", spec=r"[abc]*a[abc]{30}Z")
    first, second = (generate(engine, requests(engine, form))[0] for _ in range(2))
    assert "too many states" in str(first[1].error) and len(first[0]) > 3
    assert first[0] == second[0]


def test_a_matcher_that_raises_fails_alone(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take = Row._take

    def broken(row: Row, token: int, matcher: Any) -> None:
        if row.form.kind == "regex" and row.num_taken == 3:
            raise ZeroDivisionError
        take(row, token, matcher)

    monkeypatch.setattr(Row, "_take", broken)
    good, bad = generate(engine, [*requests(engine, PERSON), *requests(engine, LETTERS, prompt=[8])])
    check_person(good[0])
    assert bad[1].finish_reason is FinishReason.ERROR and "ZeroDivisionError" in str(bad[1].error)
    assert engine.core.kv.num_used == 0 and not engine.core.scheduler.num_running


def test_a_step_whose_sampling_fails_takes_only_its_requests(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sampling was put off until the masks were there."""
    core = engine.core
    sampler: Any = core._runner._sampler  # type: ignore[attr-defined]
    sample, failed = sampler.sample, []

    def broken(logits: Any, rows: Any, *args: Any) -> Any:
        if len(rows) == 3 and not failed:
            failed.append(rows)
            raise MemoryError
        return sample(logits, rows, *args)

    monkeypatch.setattr(sampler, "sample", broken)
    people = [*requests(engine, PERSON), *requests(engine, PERSON, prompt=[8])]
    free = requests(engine, None, prompt=[9], ignore_eos=True, max_tokens=400)
    for _, last in generate(engine, [*people, *free]):
        assert last.finish_reason is FinishReason.ERROR and "the step failed (MemoryError)" in str(last.error)
    assert len(failed) == 1 and core.kv.num_used == 0 and not core.scheduler.num_running
    core.kv.check()
    ((text, _),) = generate(engine, requests(engine, PERSON))
    check_person(text)


def test_a_dead_end_fails_alone(engine: InferenceEngine) -> None:
    no_token = requests(engine, LETTERS, allowed_token_ids=engine.tokenizer.encode("z", False), prompt=[8])
    good, bad = generate(engine, [*requests(engine, PERSON), *no_token])
    check_person(good[0])
    assert bad[1].finish_reason is FinishReason.ERROR and "allowed_token_ids" in str(bad[1].error)


def test_a_grammar_that_the_engine_cannot_compile_is_refused(engine: InferenceEngine) -> None:
    (request,) = requests(engine, LETTERS)
    values = {name: getattr(request, name) for name in request.__struct_fields__}
    broken = EngineRequest(**{**values, "grammar": "start: x"})
    ((_, output),) = generate(engine, [broken])
    assert output.finish_reason is FinishReason.ERROR and output.param == "structured_outputs"
    assert "cannot be compiled" in str(output.error)


def test_a_request_may_leave_while_its_grammar_compiles(engine: InferenceEngine) -> None:
    core = engine.core
    leaving, staying = requests(engine, PERSON, n=2)
    core.add_samples([leaving, staying])
    assert core.has_work() and core.abort(leaving.request_id) and not core.abort(leaving.request_id)
    seen = set()
    while core.has_work():
        seen |= {output.request_id for output in core.step()}
    assert seen == {staying.request_id}


# ---- how masks follow tokens -----------------------------------------------------------------------


def test_a_stale_mask_is_never_applied() -> None:
    row = Row(LETTERS, lambda: _Matcher(), 64)
    row.advance([])
    assert row.mask(0) is not None and row.problem is None
    row.advance([1, 2])
    mask = row.mask(1)
    assert mask is not None and not mask.any() and "for 2 tokens, not for 1" in str(row.problem)


def test_many_rows_are_computed_in_one_job_on_any_number_of_threads(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some begin and end in the middle of the others' forms. Few are computed in the engine's thread."""
    texts = []
    for many, lexers in ((1000, 1), (4, 4)):
        monkeypatch.setattr("microvllm.runtime.grammar.masks.MANY", many)
        monkeypatch.setattr("microvllm.runtime.grammar.compiled.LEXERS", lexers)
        engine = engine_with(checker, async_scheduling=True)
        wanted = [r for i in range(12) for r in requests(engine, PERSON, prompt=[5, i], seed=i)]
        texts.append([text for text, _ in generate(engine, wanted)])
        for text in texts[-1]:
            check_person(text)
        masks = engine.core._masks
        assert masks.counts.own_seconds > 0
        assert (masks.counts.jobs > 0) == (many == 4) and masks.counts.alone >= len(wanted)
    assert texts[0] == texts[1]


def test_a_job_that_outlasts_its_request_writes_no_mask_of_another() -> None:
    masks = GrammarMasks(make_engine(variant_folder("llama-tied")).config, lambda: None)
    row = Row(LETTERS, lambda: _Matcher(), 64)
    masks._rows[0] = row
    table = masks._masks_table()
    masks.clear_row(0)
    assert masks._masks_table() is table
    masks._rows[0], row.job = row, Future()
    masks.clear_row(0)
    newer = masks._masks_table()
    assert newer is not table
    masks._rows[0], row.job = row, None
    row.group = Group([(row, 1, True)], newer)  # is not computed yet
    masks.clear_row(0)
    assert masks._masks_table() is not newer


def test_a_mask_that_fails_among_others_fails_alone() -> None:
    good, bad = (Row(LETTERS, matcher, 64, place) for place, matcher in enumerate((_Matcher, _Failing)))
    for row in (good, bad):
        row.take([])
    group = Group([(good, 0, True), (bad, 0, True)], np.zeros((2, 2), np.int32))
    group.compute_here()
    assert group.settled and (good.words == -1).all() and good.problem is None
    assert bad.problem == "it failed (ZeroDivisionError)"


def test_steps_that_wait_for_masks_are_counted() -> None:
    masks = GrammarMasks(make_engine(variant_folder("llama-tied")).config, lambda: None)
    row = Row(LETTERS, _Matcher, 64)
    row.advance([])
    masks._rows[0] = row
    for job, waits in ((_Awaited(), 1), (_Awaited(), 2), (None, 2)):
        row.job = job
        assert masks._bits([0], [0])[0] == [0]
        assert masks.counts.waits == waits
    assert masks.counts.steps == 3 and masks.counts.wait_seconds > 0


def test_a_group_is_slow_only_if_it_computed_that_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other work on the machine nor several threads make it so: its rows would leave the batch."""

    class Executor:
        def __init__(self, work: float, wait: float) -> None:
            self.work, self.wait = work, wait

        def unsafe_compute_mask_ptr(self, *args: Any) -> None:
            end = time.process_time() + self.work
            while time.process_time() < end:
                pass
            time.sleep(self.wait)

    row = Row(LETTERS, lambda: _Matcher(), 64)
    row.advance([])
    for work, wait, slow in ((0.0, 0.02, False), (0.02, 0.0, True)):
        group = Group([(row, 1, True)], np.zeros((1, 2), np.int32))
        group.compute(Executor(work, wait), threading.Event())  # type: ignore[arg-type]
        group.settle(None)
        assert row.slow == slow


def test_requests_with_slow_masks_do_not_hold_up_others(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose mask waits for the other's end would stop a batch that waited for it."""
    engine = engine_with(checker, async_scheduling=True)
    masks = engine.core._masks
    assert masks is not None
    gate, advance = threading.Event(), Row.advance

    def slow(row: Row, tokens: Sequence[int]) -> None:
        if row.form.kind == "regex" and row.num_taken + len(tokens) >= 4:
            assert gate.wait(60)
        advance(row, tokens)
        row.slow = row.form.kind == "regex"

    monkeypatch.setattr(Row, "advance", slow)
    (letters,) = requests(engine, LETTERS)
    (free,) = requests(engine, None, prompt=[9], ignore_eos=True, max_tokens=60)
    for request in (letters, free):
        engine.core.add_samples([request])
    outputs: dict[int, list[StepOutput]] = {letters.request_id: [], free.request_id: []}
    while engine.core.has_work():
        for output in engine.core.step():
            outputs[output.request_id].append(output)
        if outputs[free.request_id] and outputs[free.request_id][-1].finish_reason is not None:
            if not gate.is_set():
                assert 0 < sum(len(output.token_ids) for output in outputs[letters.request_id]) <= 4
            gate.set()
    text = text_of(engine, outputs[letters.request_id])
    assert len(text) == 12 and set(text) <= set("abcdef")


def test_compiled_grammars_are_kept_and_bounded(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microvllm.runtime.grammar.compiled.MAX_COMPILED", 2)
    engine = engine_with(checker)
    masks = engine.core._masks
    assert isinstance(masks, GrammarMasks)
    made: list[str] = []
    make = masks._compiled._make
    monkeypatch.setattr(masks._compiled, "_make", lambda grammar: (made.append(grammar), make(grammar))[1])
    for letter in "aabcba":
        form = StructuredOutput(kind="regex", spec=letter)
        assert generate(engine, requests(engine, form))[0][0] == letter
    assert len(masks._compiled) == 2
    assert [grammar[-2] for grammar in made] == ["a", "b", "c", "a"]


class _Matcher:
    """A matcher that allows every token."""

    def consume_token(self, token: int) -> bool:
        return True

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        import ctypes

        ctypes.memset(address, 255, size)

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False

    def stop_reason(self) -> str:
        return "NotStopped"


class _Failing(_Matcher):
    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        raise ZeroDivisionError


class _Awaited(Future[None]):
    """A job that is done when it is waited for."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.set_result(None)
        return super().exception(timeout)
