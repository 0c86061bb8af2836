"""The parts of a step: each second belongs to exactly one of them."""

from __future__ import annotations

import pytest
from fakes import Engine, make_request

from microvllm.runtime.worker import step_times
from microvllm.runtime.worker.step_times import ALL_PARTS, PARTS, StepClock


def test_every_second_is_of_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(step_times, "perf_counter", lambda: next(times))
    clock = StepClock()
    for part in ("schedule", "forward", "schedule", "idle"):
        clock.enter(part)
    seconds = {"idle": 1.0, "schedule": 2.0 + 4.0, "forward": 3.0}
    assert clock.seconds == {part: seconds.get(part, 0.0) for part in PARTS}


@pytest.mark.parametrize("ahead", [False, True])
def test_the_core_tells_its_parts(ahead: bool) -> None:
    engine = Engine(async_scheduling=ahead)
    engine.core.add(make_request(0, [1, 2, 3], 4))
    while engine.core.has_work():
        engine.core.step()
    stats = engine.core.stats()
    for part in ("schedule", "prepare", "wait", "commit", "messages"):
        assert stats.step_seconds[ALL_PARTS.index(part)] > 0, part
