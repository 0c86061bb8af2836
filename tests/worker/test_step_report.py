"""`--log-step-times`: what the tables say, that they account for all of the time, and where they come out."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import Engine, FakeRunner, FakeStep, make_request
from model_tools import BACKENDS, generate_ids, make_engine, variant_folder

from microvllm import cli
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.core.engine_core import StepInFlight
from microvllm.runtime.core.plan import StepPlan, StepResult
from microvllm.runtime.metrics.engine_metrics import EngineMetrics
from microvllm.runtime.metrics.metric_families import EngineCollector
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.worker import step_times
from microvllm.runtime.worker.model_runner import ModelGraphRunner
from microvllm.runtime.worker.step_times import (
    ALL_PARTS,
    FORWARD_PARTS,
    GPU_BUSY,
    GPU_IDLE,
    STEP_PARTS,
    DeviceClock,
    Period,
    StepClock,
    Tally,
    quantile,
    render,
)

# ---- the table --------------------------------------------------------------------------------------

SECONDS = {"schedule": 1, "prepare": 4, "forward": 60, "sample": 15, "wait": 10, "commit": 2, "messages": 8}
ON_A_CPU = {"embedding": 3.0, "attention": 12.0, "head": 9.0}
NOT_TOLD_APART = dict.fromkeys(ON_A_CPU, 0.0)


def tally(steps: int, sequences: int, tokens: int, scale: float, **more: float) -> Tally:
    seconds = {part: scale * value for part, value in SECONDS.items()}
    made = Tally(steps, sequences, tokens, seconds | {name: scale * value for name, value in more.items()})
    made.totals.extend(scale * 100 / steps for _ in range(steps))
    return made


def test_the_table_on_a_cpu() -> None:
    kinds = {"decode": tally(1000, 34_200, 34_200, 0.1, **ON_A_CPU), "prefill": tally(4, 20, 2050, 1e-2)}
    kinds["prefill"].seconds |= {"embedding": 0.02, "attention": 0.2, "head": 0.01}
    period = Period(kinds, 12.5, 1.26)  # type: ignore[arg-type]
    assert render(period, "Step times of the last 12.5 s").splitlines() == [
        "Step times of the last 12.5 s, 1.3 s of it without requests:",
        "                      decode          with prefill",
        "steps                  1,000                     4",
        "sequences               34.2                   5.0",
        "tokens                  34.2                 512.5",
        "                          ms   share            ms   share",
        "schedule               0.100    1.0%         2.500    1.0%",
        "prepare                0.400    4.0%        10.000    4.0%",
        "forward                6.000   60.0%       150.000   60.0%",
        "  embedding            0.300    3.0%         5.000    2.0%",
        "  cache, attn.         1.200   12.0%        50.000   20.0%",
        "  layers               3.600   36.0%        92.500   37.0%",
        "  norm, head           0.900    9.0%         2.500    1.0%",
        "sample                 1.500   15.0%        37.500   15.0%",
        "wait                   1.000   10.0%        25.000   10.0%",
        "commit                 0.200    2.0%         5.000    2.0%",
        "messages               0.800    8.0%        20.000    8.0%",
        "step                  10.000  100.0%       250.000  100.0%",
        "  p50                 10.000               250.000",
        "  p99                 10.000               250.000",
    ]


def test_the_table_on_a_gpu() -> None:
    decode = tally(100, 6400, 6400, 5e-3, **NOT_TOLD_APART, **{GPU_BUSY: 97.0, GPU_IDLE: 2.0})
    decode.totals[0], decode.totals[1] = 0.050, 0.020
    lines = render(Period({"decode": decode, "prefill": Tally()}, 0.5, 0.0, 100), "All").splitlines()
    assert lines[:5] == [
        "All:",
        "                      decode",
        "steps                    100",
        "sequences               64.0",
        "tokens                  64.0",
    ]
    assert lines[lines.index("step                   5.000  100.0%") :] == [
        "step                   5.000  100.0%",
        "  p50                  5.000",
        "  p99                 20.000",
        "GPU busy               4.850   97.0%",
        "GPU idle               0.100    2.0%",
        "forward and sample are the host's launches, wait is for the GPU; GPU idle: between steps",
        "100 steps ran as a CUDA graph, whose parts cannot be told apart",
    ]
    assert not any("attn." in line for line in lines), "a part that nobody measured"


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert quantile([7.0], 0.99) == quantile([7.0], 0.5) == 7.0
    assert quantile([3.0, 1.0], 0.5) == 1.0


# ---- the accounts, on a clock that a test sets ------------------------------------------------------


class Time:
    """Stands still but for what a test adds."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(step_times, "perf_counter", time)
    return time


class SlowRunner(FakeRunner):
    """Preparing takes 1 s, a forward pass 2 s and half a second a token, sampling 4 s, waiting 8 s."""

    def __init__(self, config: Any, time: Time) -> None:
        super().__init__(config)
        self.time = time

    def launch(self, plan: StepPlan) -> FakeStep:
        self.time.now += 1
        self.clock.enter("forward")
        self.time.now += 2
        self.clock.timed("attention", self.attend)(sum(item.num_new for item in plan.scheduled))
        self.clock.enter("sample")
        self.time.now += 4
        return super().launch(plan)

    def attend(self, num_tokens: int) -> None:
        self.time.now += num_tokens / 2

    def collect(self, step: StepInFlight) -> StepResult:
        self.time.now += 8
        return super().collect(step)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, time: Time, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("fakes.FakeRunner", lambda config: SlowRunner(config, time))
    return Engine(log_step_times=True, async_scheduling=request.param)


def test_the_accounts_are_exact(engine: Engine, time: Time) -> None:
    """Two prompts of 5 and 3 tokens in one step, then three decodes of both and one of the longer answer."""
    report = engine.core.report
    assert report is not None
    time.now += 50  # before the first request
    engine.run(make_request(0, range(5), 5, eos=None), make_request(1, range(3), 4, eos=None))
    kinds = report._part.kinds
    prefill, decode = kinds["prefill"], kinds["decode"]
    assert (prefill.steps, prefill.sequences, prefill.tokens) == (1, 2, 8)
    assert (decode.steps, decode.sequences, decode.tokens) == (4, 7, 7)
    assert report._part.idle == 50
    assert engine.core.stats().decode_steps == 4 and engine.core.stats().steps == 5
    both = {part: prefill.seconds[part] + decode.seconds[part] for part in decode.seconds}
    expected = {"prepare": 5.0, "forward": 10 + 7.5, "attention": 7.5, "sample": 20.0, "wait": 40.0}
    assert both == dict.fromkeys(both, 0.0) | expected
    assert sum(prefill.totals) + sum(decode.totals) == 5 + 17.5 + 20 + 40 == time.now - 150
    assert len(prefill.totals) == 1 and len(decode.totals) == 4
    # With steps ahead, the launch of a step is in the account of the one before it.
    assert prefill.totals[0] == (19.0 + 8.0 if engine.config.async_scheduling else 19.0)


def test_without_the_flag_nothing_is_kept() -> None:
    engine = Engine()
    engine.run(make_request(0, range(5), 5))
    assert engine.core.report is None
    seconds = dict(zip(ALL_PARTS, engine.core.stats().step_seconds, strict=False))
    assert seconds["attention"] == 0.0 and GPU_BUSY not in seconds


def titles(written: str) -> list[str]:
    return re.findall(r"^\n(Step times .*):$", written, re.MULTILINE)


def test_when_tables_are_written(
    time: Time, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 40 s of steps, and after 40 s of anything when the engine comes to rest."""
    monkeypatch.setattr(step_times, "INTERVAL_S", 40.0)
    monkeypatch.setattr("fakes.FakeRunner", lambda config: SlowRunner(config, time))
    engine = Engine(log_step_times=True)
    report = engine.core.report
    assert report is not None

    def work(request_id: int, num_tokens: int) -> list[list[str]]:
        """What is written after each step of a request: one of 17 s and then some of 15.5 s."""
        engine.add(make_request(request_id, [request_id] * 4, num_tokens, eos=None))
        engine.core.clock.enter("messages")
        found = []
        while engine.core.has_work():
            engine.step()
            report.write_if_due(not engine.core.has_work())
            found.append(titles(capsys.readouterr().err))
        engine.core.clock.enter("idle")
        return found

    time.now += 60
    report.write_if_due(True)
    assert capsys.readouterr().err == "", "there was no step"
    last = "Step times of the last"
    assert work(1, 9) == [
        *([], [], [f"{last} 108.0 s, 60.0 s of it without requests"]),
        *([], [], [f"{last} 46.5 s"]),
        *([], [], [f"{last} 46.5 s"]),
    ]
    assert work(2, 1) == [[]]
    time.now += 20
    assert work(3, 1) == [[f"{last} 54.0 s, 20.0 s of it without requests"]]
    assert work(4, 1) == [[]]
    report.write_last()
    assert titles(capsys.readouterr().err) == ["Step times of all 272.0 s, 80.0 s of it without requests"]


def test_the_last_table_repeats_none(time: Time, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(log_step_times=True)
    report = engine.core.report
    assert report is not None
    report.write_last()
    assert capsys.readouterr().err == "", "there was no step"
    engine.run(make_request(0, range(4), 2, eos=None))
    report.write()
    assert len(titles(capsys.readouterr().err)) == 1
    report.write_last()
    assert capsys.readouterr().err == "", "the one table was of everything"
    for i in (1, 2):
        engine.run(make_request(i, [i] * 4, 3, eos=None))
        report.write()
    capsys.readouterr()
    report.write_last()
    written = capsys.readouterr().err
    assert titles(written) == ["Step times of all 0.0 s"]
    assert re.search(r"^steps +5 +3$", written, re.MULTILINE), written


def test_a_closed_log_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(log_step_times=True)
    engine.run(make_request(0, range(4), 2, eos=None))
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert engine.core.report is not None
    engine.core.report.write()


# ---- the GPU's clock, on a device that is simulated ---------------------------------------------------


class Device:
    """Runs what it is given, one after the other: `busy_until` is when it is through."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.busy_until = 0.0

    def run(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.time.now) + seconds


class FakeEvent:
    device: Device

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = max(self.device.busy_until, self.device.time.now)

    def synchronize(self) -> None:
        self.device.time.now = max(self.device.time.now, self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.at <= self.device.time.now, "asked before it has happened"
        return 1e3 * (other.at - self.at)


@pytest.fixture
def device(time: Time, monkeypatch: pytest.MonkeyPatch) -> Device:
    FakeEvent.device = Device(time)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return FakeEvent.device


def launch(clock: DeviceClock, device: Device, seconds: float) -> None:
    clock.begin()
    device.run(seconds)
    clock.end()


def test_what_the_gpu_waits_for_the_host_is_idle(time: Time, device: Device) -> None:
    host = StepClock()
    clock = DeviceClock(host)
    launch(clock, device, 3.0)
    clock.collect()
    assert (clock.busy_seconds, clock.idle_seconds) == (3.0, 0.0)
    time.now += 0.5  # the host takes its time
    launch(clock, device, 2.0)
    clock.collect()
    assert (clock.busy_seconds, clock.idle_seconds) == (5.0, 0.5)
    # Launched ahead: the GPU goes from one to the next.
    launch(clock, device, 4.0)
    launch(clock, device, 4.0)
    clock.collect()
    clock.collect()
    assert (clock.busy_seconds, clock.idle_seconds) == (13.0, 0.5)


def test_time_without_requests_is_not_idle_time_of_the_gpu(time: Time, device: Device) -> None:
    host = StepClock()
    clock = DeviceClock(host)
    launch(clock, device, 1.0)
    clock.collect()
    host.enter("idle")
    time.now += 60
    host.enter("schedule")
    launch(clock, device, 1.0)
    clock.collect()
    time.now += 0.25
    launch(clock, device, 1.0)
    clock.collect()
    assert (clock.busy_seconds, clock.idle_seconds) == (3.0, 0.25)


def test_a_launch_that_fails_leaves_the_clock_in_order(time: Time, device: Device) -> None:
    clock = DeviceClock(StepClock())
    launch(clock, device, 1.0)
    clock.begin()  # and no end
    clock.collect()
    launch(clock, device, 2.0)
    clock.collect()
    assert clock.busy_seconds == 3.0


class Calls:
    """In place of a `DeviceClock`: what it is told, by a step's first letter."""

    busy_seconds = idle_seconds = 0.0

    def __init__(self) -> None:
        self.told = ""

    def begin(self) -> None:
        self.told += "b"

    def end(self) -> None:
        self.told += "e"

    def collect(self) -> None:
        self.told += "c"


@pytest.mark.parametrize(("ahead", "told"), [(False, "bec" * 6), (True, "be" + "bec" * 5 + "c")])
def test_the_runner_tells_every_step_once(ahead: bool, told: str) -> None:
    """Also those of prompts in pieces, which sample nothing: three, and then three decodes."""
    engine = make_engine(
        variant_folder("llama-tied"),
        attention_backend="torch",
        async_scheduling=ahead,
        max_num_batched_tokens=4,
        max_num_seqs=4,
    )
    runner, clock = engine.core._runner, Calls()
    assert isinstance(runner, ModelGraphRunner)
    runner._device.device_clock = clock  # type: ignore[assignment]
    generate_ids(engine, [list(range(10))], 4)
    assert clock.told == told


# ---- a real model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_add_up_to_the_time_that_passed(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine(variant_folder("qwen3"), log_step_times=True, attention_backend=backend)
    report = engine.core.report
    assert report is not None
    clock, began = engine.core.clock, engine.core.clock._since
    before = sum(clock.seconds.values())
    params = SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True, logprobs=2)
    list(engine.generate_deltas([engine.sequences([7, 8, 9] * i, params)[0] for i in range(1, 6)]))
    assert sum(clock.seconds.values()) - before == pytest.approx(clock._since - began, rel=1e-9)
    told = report._whole
    assert told.steps == engine.core.stats().steps == 12 and not report._part.steps
    tallies = told.kinds.values()
    for part in STEP_PARTS:
        if part != "messages":  # of which the last are after the last account
            assert sum(t.seconds[part] for t in tallies) == pytest.approx(clock.seconds[part], rel=1e-9)
    assert sum(t.total for t in tallies) == pytest.approx(sum(sum(t.totals) for t in tallies), rel=1e-9)
    stats = engine.core.stats()
    seconds = dict(zip(ALL_PARTS, stats.step_seconds, strict=False))
    inside = [seconds[part] for part in FORWARD_PARTS]
    assert min(inside) > 0 and sum(inside) < seconds["forward"]
    assert sum(t.total for t in tallies) + told.idle <= told.seconds
    (title,) = titles(capsys.readouterr().err)
    assert title.startswith("Step times of the last ")


def test_generate_writes_its_table_below_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "The quick brown", "--model", str(variant_folder("llama-tied")), "--max-tokens", "6"]
    argv += ["--temperature", "0", "--ignore-eos", "--cpu-threads", "1", "--attention-backend", "torch"]
    assert cli.run(argv) == 0
    plain = capsys.readouterr()
    assert cli.run([*argv, "--log-step-times"]) == 0
    measured = capsys.readouterr()
    assert measured.out == plain.out and "Step times" not in plain.err
    assert len(titles(measured.err)) == 1
    assert re.search(r"^steps +5 +1$", measured.err, re.MULTILINE), measured.err


async def test_an_engine_process_tells_at_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    config = EngineArgs(
        model=str(variant_folder("llama-tied")),
        dtype="float32",
        cpu_threads=1,
        num_gpu_blocks_override=64,
        attention_backend="torch",
        log_step_times=True,
    ).resolve()
    client = await EngineClient.start(config)
    try:
        params = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
        (stream,) = client.submit([5, 70, 200], params)
        async for _ in stream:
            pass
        stats = client.stats
        assert "Step times" not in capfd.readouterr().err
    finally:
        await client.close()
    written = capfd.readouterr().err
    assert len(titles(written)) == 1
    assert re.search(r"^steps +6 +1$", written, re.MULTILINE), written
    assert stats.step_seconds[ALL_PARTS.index("attention")] > 0 and stats.decode_steps == 6


# ---- /metrics ---------------------------------------------------------------------------------------


def exposed(stats: EngineStats) -> dict[tuple[str, ...], float]:
    """{(name, value of the last label): number} of our own metrics."""
    config = EngineArgs(model=str(variant_folder("llama-tied")), attention_backend="torch").resolve()
    families = EngineCollector([EngineMetrics(100, stats)], "m", config).collect()
    return {
        (sample.name, *list(sample.labels.values())[2:]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("microvllm:")
    }


def test_what_was_measured_is_exposed() -> None:
    measured = {
        "forward": 8.0,
        "embedding": 0.5,
        "attention": 2.0,
        "head": 1.5,
        GPU_BUSY: 6.0,
        GPU_IDLE: 0.25,
    }
    seconds = [measured.get(part, 0.0) for part in ALL_PARTS]
    found = exposed(EngineStats(steps=10, decode_steps=7, step_seconds=seconds))
    name = "microvllm:engine_steps_by_kind_total"
    assert (found[name, "decode"], found[name, "prefill"]) == (7, 3)
    name = "microvllm:forward_seconds_total"
    parts = {"embedding": 0.5, "attention": 2.0, "head": 1.5, "layers": 4.0}
    assert {key[1]: value for key, value in found.items() if key[0] == name} == parts
    name = "microvllm:gpu_seconds_total"
    assert (found[name, "busy"], found[name, "idle"]) == (6.0, 0.25)
    names: Sequence[str] = [key[0] for key in exposed(EngineStats())]
    assert "microvllm:forward_seconds_total" not in names and "microvllm:gpu_seconds_total" not in names
