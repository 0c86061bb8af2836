"""Who may join the queue: its bounds, the measured rate, and what happens when time runs out."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Engine, make_config, make_request

from microvllm.runtime.core import deadlines as deadlines_module
from microvllm.runtime.core import scheduler as scheduler_module
from microvllm.runtime.core.plan import Request
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.admission import Admission, QueueFullError, shared_tokens
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams, StructuredOutput

BUSY = EngineStats(num_running=8, num_waiting=5)


def admission(**options: Any) -> Admission:
    return Admission(make_config(max_num_seqs=8, **options))


def test_a_request_that_finds_a_free_row_always_passes() -> None:
    full = admission(max_num_queued_reqs=1, max_num_queued_tokens=10)
    full.enter(1000)
    full.check(EngineStats(num_running=7), 1, 5000)
    with pytest.raises(QueueFullError):
        full.check(EngineStats(num_running=8), 1, 5000)


@pytest.mark.parametrize(("count", "fits"), [(5, True), (6, False)])
def test_the_number_of_waiting_requests_is_bounded(count: int, fits: bool) -> None:
    bounded = admission(max_num_queued_reqs=10)
    if fits:
        bounded.check(BUSY, count, 1)
        return
    with pytest.raises(QueueFullError) as caught:
        bounded.check(BUSY, count, 1)
    assert (caught.value.option, caught.value.status) == ("max_num_queued_reqs", 503)


def test_the_prompt_tokens_that_wait_are_bounded() -> None:
    bounded = admission(max_num_queued_tokens=100)
    bounded.check(BUSY, 1, 5000)  # alone it may be larger than the bound
    bounded.enter(60)
    bounded.check(BUSY, 1, 40)
    with pytest.raises(QueueFullError) as caught:
        bounded.check(BUSY, 1, 41)
    assert caught.value.option == "max_num_queued_tokens"
    bounded.leave(60)
    bounded.check(BUSY, 1, 41)


def test_what_is_beside_the_prompts_counts_as_tokens() -> None:
    def counted(**options: Any) -> int:
        grammar = options.pop("grammar", "")
        words = options.pop("bad_word_ids", [])
        params = SamplingParams(**options)
        return shared_tokens(EngineRequest(-1, [], params, bad_word_ids=words, grammar=grammar))

    assert counted() == 0
    assert counted(allowed_token_ids=list(range(5000))) == 5000
    assert counted(logit_bias=dict.fromkeys(range(100), 1.0)) == 200
    form = StructuredOutput(kind="regex", spec="a" * 1600)
    assert counted(structured_outputs=form, grammar="b" * 3200) == 300
    assert counted(stop=["c" * 1600]) == 100
    assert counted(bad_words=["d" * 160], bad_word_ids=[[1, 2], [3]]) == 13


def steps(measured: Admission, count: int, per_step: int, seconds: float) -> None:
    for i in range(count):
        for _ in range(per_step):
            measured.enter(1)
            measured.leave(1)
            measured.rates[0].began += 1
        measured.rates[0].measure(BUSY, 100 + i * seconds)


def test_retry_after_comes_from_the_measured_rate() -> None:
    measured = admission(max_num_queued_reqs=10)
    with pytest.raises(QueueFullError) as caught:
        measured.check(BUSY, 25, 1)
    assert caught.value.retry_after_s == 0  # nothing is known yet; the header says 1
    steps(measured, 100, 2, 0.5)
    assert measured.rate == pytest.approx(4)
    with pytest.raises(QueueFullError) as caught:
        measured.check(BUSY, 25, 1)
    assert caught.value.retry_after_s == pytest.approx(20 / 4)


def test_the_rate_counts_only_time_with_a_queue() -> None:
    measured = admission()
    steps(measured, 50, 1, 0.5)
    measured.rates[0].measure(EngineStats(num_running=1), 200.0)
    rate = measured.rate
    measured.rates[0].measure(EngineStats(num_running=1), 900.0)
    assert measured.rate == rate


def test_auto_admits_what_is_predicted_to_begin_in_time() -> None:
    timed = admission(max_num_queued_reqs=1000, queue_timeout=3.0, admit_by_rate=True)
    timed.check(BUSY, 3, 1)  # nothing measured: one batch may wait
    with pytest.raises(QueueFullError):
        timed.check(BUSY, 4, 1)
    steps(timed, 100, 2, 0.5)
    timed.check(BUSY, 7, 1)  # 12 wait, 4 a second
    with pytest.raises(QueueFullError) as caught:
        timed.check(BUSY, 15, 1)
    assert caught.value.retry_after_s == pytest.approx(20 / 4 - 3)


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def arriving(*args: Any) -> Request:
        request = Request(*args)
        request.arrived_at = clock.now
        return request

    for module in (scheduler_module, deadlines_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(scheduler_module, "Request", arriving)
    return clock


def test_a_request_that_waits_too_long_ends_and_others_go_on(clock: Clock) -> None:
    engine = Engine(max_num_seqs=1, queue_timeout=2.0)
    engine.add(make_request(1, [1, 2], max_tokens=30, eos=None), make_request(2, [3], eos=None))
    engine.step()
    clock.now += 1.5
    engine.add(make_request(3, [4], max_tokens=2, eos=None))
    clock.now += 1.0
    (late,) = [output for output in engine.core.step() if output.finish_reason is not None]
    assert (late.request_id, late.finish_reason) == (2, FinishReason.QUEUE_TIMEOUT)
    engine.drain()
    assert len(engine.answers[3].tokens) == 2


def test_a_request_that_takes_too_long_ends_wherever_it_is(clock: Clock) -> None:
    engine = Engine(max_num_seqs=1, request_timeout=5.0, async_scheduling=True)
    engine.add(make_request(1, [1, 2], max_tokens=60, eos=None), make_request(2, [3], eos=None))
    for _ in range(4):
        engine.step()
    clock.now += 5.5
    ended = {output.request_id: output.finish_reason for output in engine.core.step() if not output.token_ids}
    assert ended == {1: FinishReason.REQUEST_TIMEOUT, 2: FinishReason.REQUEST_TIMEOUT}
    while engine.core.has_work():
        engine.core.step()
    engine.check_rest()
