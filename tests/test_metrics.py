"""What the engine counts: names, labels and exact counts, over a scripted engine and over a real one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import prometheus_client
import pytest
import pytest_asyncio
from http_tools import in_process
from hypothesis import given
from hypothesis import strategies as st
from metrics_case import GENERATE, scrape, wish
from model_tools import LONG, long_folder
from process_tools import own_engines, wait_until_async

from microvllm.openai_compat.metrics import stats_line
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.errors import EngineBusyError, EngineDeadError
from microvllm.runtime.metrics.engine_metrics import HISTOGRAMS, EngineMetrics, Histogram, one_two_five
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process import replica as replica_module
from microvllm.runtime.process import token_stream as stream_module
from microvllm.runtime.process.channel import Abort, Profiled, Step
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.process.token_stream import TokenStream
from microvllm.runtime.request import FinishReason, SamplingParams, StepOutput
from microvllm.runtime.text.input_processor import InputProcessor
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.worker.step_times import PARTS

on_the_engines_loop = pytest.mark.asyncio(loop_scope="module")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
# What vLLM's Grafana dashboard and the usual autoscalers query.
DASHBOARD = (
    *(f"vllm:{name}" for name in GAUGES),
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:cache_config_info",
)


@given(st.lists(st.one_of(st.floats(0, 3000), st.sampled_from((0.001, 0.1, 1, 2560)))))
def test_a_histogram_is_the_librarys(values: list[float]) -> None:
    """Also for values that are bounds, and for those above the last."""
    bounds = HISTOGRAMS["time_to_first_token_seconds"]
    assert bounds is not None
    theirs = prometheus_client.Histogram("h", "", buckets=bounds, registry=None)
    ours = Histogram(bounds)
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    samples = [sample.value for sample in theirs.collect()[0].samples if sample.name == "h_bucket"]
    assert ours.cumulative() == samples
    assert ours.sum == pytest.approx(sum(values))


def test_several_equal_values_at_once() -> None:
    histogram = Histogram((1, 2))
    histogram.observe(1.5, 3)
    assert (histogram.cumulative(), histogram.sum) == ([0, 3, 3], 4.5)


def test_bounds_of_token_counts_end_at_the_context() -> None:
    assert one_two_five(1) == [1]
    assert one_two_five(49) == [1, 2, 5, 10, 20]
    assert one_two_five(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


class Clock:
    """In place of the `time` module of the client."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class ScriptedProcess:
    """In place of an engine process: notes what it is sent, and dies when it is told to."""

    def __init__(self) -> None:
        self.first_stats = EngineStats()
        self.pid = os.getpid()
        self.sent: list[Any] = []
        self.died = asyncio.Event()

    def send_command(self, command: Any) -> None:
        self.sent.append(command)

    async def read_event(self) -> Any:
        await self.died.wait()
        raise EngineDeadError("dead")

    async def end(self, patience_s: float = 0) -> str:
        return ""


class Script:
    """A client whose engine says what a test writes, when the test says."""

    def __init__(self, client: EngineClient, clock: Clock, metrics: EngineMetrics) -> None:
        self.client, self.clock, self.metrics = client, clock, metrics
        (self.replica,) = client.replicas
        self.stats = EngineStats()

    def submit(self, prompt: list[int], **params: Any) -> list[TokenStream]:
        return self.client.submit(prompt, SamplingParams(**params))

    def step(self, at: float, stats: dict[str, Any], *outputs: StepOutput) -> None:
        """One step that arrives at `at` seconds; `stats` are those that have changed since the last one."""
        self.clock.now = 1000.0 + at
        values = {name: getattr(self.stats, name) for name in EngineStats.__struct_fields__}
        self.stats = EngineStats(**{**values, "steps": self.stats.steps + 1, **stats})
        self.replica.handle(Step(list(outputs), self.stats))

    def buckets(self, name: str) -> list[int]:
        return self.metrics.histograms[name].cumulative()

    def seen(self, name: str) -> tuple[int, float]:
        """How many values a histogram has, and their sum."""
        histogram = self.metrics.histograms[name]
        return histogram.cumulative()[-1], pytest.approx(histogram.sum)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    options: dict[str, Any] = {"dtype": "float32", "cpu_threads": 1, "num_gpu_blocks_override": LONG // 16}
    return EngineArgs(model=str(long_folder()), max_num_seqs=4, max_num_queued_reqs=2, **options).resolve()


@pytest.fixture(scope="module")
def text(config: EngineConfig) -> tuple[Tokenizer, InputProcessor]:
    tokenizer = Tokenizer.load(long_folder())
    return tokenizer, InputProcessor(config, tokenizer)


@pytest_asyncio.fixture
async def script(
    config: EngineConfig, text: tuple[Tokenizer, InputProcessor], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Script]:
    clock = Clock()
    for module in (replica_module, stream_module):
        monkeypatch.setattr(module, "time", clock)
    client = EngineClient(config, *text, str(long_folder()))
    client.replicas[0].use(ScriptedProcess())  # type: ignore[arg-type]
    metrics = EngineMetrics(config.max_model_len, client.stats)
    client.replicas[0].observer = metrics
    yield Script(client, clock, metrics)
    client._workers.shutdown()


def token(stream: TokenStream, finish: FinishReason | None = None, **more: Any) -> StepOutput:
    return StepOutput(stream.request_id, [70], finish, **more)


async def test_every_time_of_a_request(script: Script) -> None:
    (stream,) = script.submit([5] * 20, max_tokens=3)
    script.step(0.5, {"prompt_tokens": 4}, token(stream, num_cached_tokens=16, scheduled_at=1000.2))
    timing = stream.timing
    assert (timing.arrival, timing.scheduled, timing.first_token) == (1000.0, 1000.2, 1000.5)
    script.step(0.75, {}, token(stream, num_cached_tokens=16))
    script.step(2.0, {}, token(stream, FinishReason.LENGTH, num_preemptions=2))
    assert (timing.first_token, timing.last_token) == (1000.5, 1002.0)
    seen = script.seen
    assert seen("time_to_first_token_seconds") == (1, 0.5)
    assert seen("inter_token_latency_seconds") == (2, 1.5)
    assert seen("request_queue_time_seconds") == (1, 0.2)
    assert seen("request_prefill_time_seconds") == (1, 0.3)
    assert seen("request_decode_time_seconds") == (1, 1.5)
    assert seen("request_inference_time_seconds") == (1, 1.8)
    assert seen("e2e_request_latency_seconds") == (1, 2.0)
    assert seen("request_time_per_output_token_seconds") == (1, 0.75)
    assert seen("request_prompt_tokens") == (1, 20)
    assert seen("request_generation_tokens") == (1, 3)
    assert seen("request_prefill_kv_computed_tokens") == (1, 4)
    assert seen("request_params_max_tokens") == (1, 3)
    assert seen("request_num_preemptions") == (1, 2)
    assert script.buckets("inter_token_latency_seconds")[6:13] == [0, 1, 1, 1, 1, 1, 2]  # from 0.2 s to 2.5 s
    metrics = script.metrics
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.generation_tokens) == (20, 16, 3)


async def test_a_step_counts_what_the_engine_computed(script: Script) -> None:
    """A chunk of a prefill is a step, too, though no tokens come of it; a message without a step is none."""
    (stream,) = script.submit([5] * 20, max_tokens=2)
    script.step(0.1, {"prompt_tokens": 16})
    script.step(0.1, {"steps": 1})
    script.step(0.2, {"prompt_tokens": 20, "generation_tokens": 1}, token(stream, scheduled_at=1000.0))
    script.step(0.3, {"generation_tokens": 2}, token(stream, FinishReason.LENGTH))
    assert script.seen("iteration_tokens_total") == (3, 22)
    assert script.metrics.totals.steps == 3


async def test_a_first_token_alone_has_no_gap(script: Script) -> None:
    (stream,) = script.submit([5], max_tokens=1)
    script.step(0.1, {}, token(stream, FinishReason.LENGTH, scheduled_at=1000.0))
    assert script.seen("inter_token_latency_seconds") == (0, 0)
    assert script.seen("request_time_per_output_token_seconds") == (1, 0)


async def test_samples_of_one_prompt_are_one_request_with_n(script: Script) -> None:
    streams = script.submit([5, 6], max_tokens=3, n=3)
    begun = {"scheduled_at": 1000.0}
    script.step(
        0.1, {}, *(token(s, FinishReason.STOP if s is streams[0] else None, **begun) for s in streams)
    )
    script.step(0.2, {}, *(token(s) for s in streams[1:]))
    script.step(0.3, {}, token(streams[1], FinishReason.LENGTH))
    assert script.seen("request_params_n") == (0, 0)
    script.step(0.3, {}, token(streams[2], FinishReason.STOP))
    assert script.seen("request_params_n") == (1, 3)
    assert script.seen("request_max_num_generation_tokens") == (1, 3)
    assert script.seen("request_generation_tokens") == (3, 7)
    assert script.metrics.finished_requests["stop"] == 2


async def test_every_end_is_counted_once_and_only_whole_requests_are_measured(script: Script) -> None:
    ends = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION, FinishReason.ERROR]
    for end in ends:
        (stream,) = script.submit([5], max_tokens=9)
        script.step(0.1, {}, token(stream, scheduled_at=1000.0))
        script.step(0.2, {}, token(stream, end))
        stream.abort()  # as the server does in any case
    stopped = script.submit([5], max_tokens=9, stop=[script.client.tokenizer.decode([70])])[0]
    script.step(0.1, {}, token(stopped, scheduled_at=1000.0))
    aborted = script.submit([5], max_tokens=9)[0]
    aborted.abort()
    aborted.abort()
    assert script.metrics.finished_requests == {
        "stop": 2,
        "length": 1,
        "repetition": 1,
        "error": 1,
        "abort": 1,
    }
    assert script.seen("e2e_request_latency_seconds")[0] == 4
    assert not script.replica.streams


async def test_a_bug_in_the_text_logic_is_one_error(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    (stream,) = script.submit([5], max_tokens=9)
    monkeypatch.setattr(stream, "_text", object())
    script.step(0.1, {}, token(stream))
    ended = script.metrics.finished_requests
    assert (ended["error"], ended["abort"]) == (1, 0)
    await asyncio.sleep(0)  # aborts are sent together
    process = script.replica.process
    assert isinstance(process, ScriptedProcess) and isinstance(process.sent[-1], Abort)


async def test_a_full_queue_is_a_rejection(script: Script) -> None:
    script.submit([5], max_tokens=1, n=6, temperature=1.0)
    for _ in range(2):
        with pytest.raises(EngineBusyError):
            script.submit([5], max_tokens=1)
    assert script.metrics.rejections == {"max_num_queued_reqs": 2, "max_num_queued_tokens": 0}


def test_every_counter_of_the_engine_is_added_up() -> None:
    metrics = EngineMetrics(100, EngineStats())
    names = [name for name in EngineStats.__struct_fields__ if name != "step_seconds"]
    stats = EngineStats(*range(1, len(names) + 1), step_seconds=[1.0, 2.0])
    for _ in range(3):
        metrics.on_step(stats)
        metrics.on_engine_death()
    metrics.on_step(stats)
    assert metrics.totals.step_seconds == [4.0, 8.0]
    for name in names:
        gauge = name.startswith(("num_", "kv_"))
        assert getattr(metrics.totals, name) == getattr(stats, name) * (1 if gauge else 4), name


async def test_an_event_that_cannot_be_handled_is_the_end_of_its_engine(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = ScriptedProcess()

    async def answer_without_a_question() -> Profiled:
        return Profiled()

    async def restart() -> ScriptedProcess:
        return second

    monkeypatch.setattr(script.replica.process, "read_event", answer_without_a_question)
    monkeypatch.setattr(script.replica, "restart", restart)
    serving = asyncio.ensure_future(script.replica.serve())
    await wait_until_async(lambda: script.metrics.engine_deaths == 1, "the death is known")
    await wait_until_async(script.client.healthy, "there is an engine again")
    assert "could not be handled" in caplog.text and script.replica.process is second  # type: ignore[comparison-overlap]
    serving.cancel()


async def test_counters_go_on_and_gauges_fall_when_the_engine_dies(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = script.replica.process, ScriptedProcess()
    assert isinstance(first, ScriptedProcess)
    restarting = asyncio.Event()

    async def restart() -> ScriptedProcess:
        await restarting.wait()
        return second

    monkeypatch.setattr(script.replica, "restart", restart)
    counted = {"prompt_tokens": 8, "generation_tokens": 2, "prefix_queries": 8, "preemptions": 3}
    counted["prefix_state_misses"] = 5
    (stream,) = script.submit([5] * 8, max_tokens=9)
    now = {"num_running": 1, "kv_blocks_used": 4, "kv_blocks_total": 8, "kv_unused_slots": 7}
    script.step(0.1, {**counted, **now}, token(stream, scheduled_at=1000.0))
    serving = asyncio.ensure_future(script.replica.serve())
    first.died.set()
    metrics = script.metrics
    await wait_until_async(lambda: metrics.engine_deaths == 1, "the death is known")
    totals = metrics.totals
    assert (totals.num_running, totals.kv_usage, totals.kv_unused_slots) == (0, 0, 0)
    assert (totals.prompt_tokens, totals.steps, totals.preemptions) == (8, 1, 3)
    assert metrics.finished_requests["error"] == 1
    restarting.set()
    await wait_until_async(script.client.healthy, "there is an engine again")
    script.stats = EngineStats()
    (stream,) = script.submit([5] * 8, max_tokens=9)
    script.step(0.5, {**counted, **now}, token(stream, scheduled_at=1000.3))
    totals = metrics.totals
    assert (totals.num_running, totals.kv_usage, totals.kv_unused_slots) == (1, 0.5, 7)
    assert (totals.prompt_tokens, totals.generation_tokens, totals.steps) == (16, 4, 2)
    assert (totals.prefix_queries, totals.prefix_state_misses, totals.preemptions) == (16, 10, 6)
    assert script.seen("iteration_tokens_total") == (2, 20)
    assert "Avg prompt throughput: 1.6 tokens/s" in stats_line(EngineStats(), totals, 10.0)
    serving.cancel()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(config)
    yield client
    await client.close()
    assert own_engines() == []


@asynccontextmanager
async def serving(engine: EngineClient, **args: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A server of its own over the engine: it has counted nothing yet."""
    async with in_process(engine, served_model_names=("tiny", "alias"), **args) as http:  # type: ignore[arg-type]
        http.timeout = httpx.Timeout(120)
        yield http


@on_the_engines_loop
async def test_exact_counts_of_requests_one_after_another(engine: EngineClient) -> None:
    number, prompt, generated = 4, 7, 6
    async with serving(engine) as http:
        before = await scrape(http)  # the steps are those of the engine, whoever asked for them
        for i in range(number):
            ids = [20 * i + j for j in range(prompt)]
            answer = await http.post(GENERATE, json=wish(ids, generated, temperature=0, stream=bool(i % 2)))
            assert answer.status_code == 200
        await wait_until_async(lambda: engine.stats.num_running == 0, "the engine rests")
        now = await scrape(http)
    read = now.engine
    assert read("prompt_tokens_total") == number * prompt
    assert read("prompt_tokens_by_source_total", source="local_compute") == number * prompt
    assert read("generation_tokens_total") == number * generated
    assert read("request_success_total", finished_reason="length") == number
    for reason in ("stop", "abort", "error", "repetition"):
        assert read("request_success_total", finished_reason=reason) == 0
    assert read("time_to_first_token_seconds_count") == number
    assert read("inter_token_latency_seconds_count") == number * (generated - 1)
    assert read("iteration_tokens_total_sum") == number * (prompt + generated)
    assert read("iteration_tokens_total_count") == number * generated
    for name in HISTOGRAMS:
        if name.startswith(("request_", "e2e_")):
            assert read(f"{name}_count") == number, name
    assert read("request_prompt_tokens_sum") == number * prompt
    assert read("request_generation_tokens_sum") == number * generated
    assert read("request_max_num_generation_tokens_sum") == number * generated
    assert read("request_params_max_tokens_sum") == number * generated
    assert read("request_params_n_sum") == number
    assert read("request_prefill_kv_computed_tokens_sum") == number * prompt
    parts = (read(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert read("e2e_request_latency_seconds_sum") == pytest.approx(sum(parts))
    assert read("inter_token_latency_seconds_sum") == pytest.approx(read("request_decode_time_seconds_sum"))
    assert 0 < read("request_prefill_time_seconds_sum") <= read("time_to_first_token_seconds_sum")
    steps, kinds = "microvllm:engine_steps_total", "microvllm:engine_steps_by_kind_total"
    assert now(steps) - before(steps) == number * generated
    for kind, count in (("prefill", number), ("decode", number * (generated - 1))):
        assert now(kinds, kind=kind) - before(kinds, kind=kind) == count
    # Only measured with --log-step-times.
    assert not {"microvllm:forward_seconds_total", "microvllm:gpu_seconds_total"} & now.names
    for part in PARTS:
        assert now("microvllm:step_seconds_total", part=part) > 0, part
    for name in GAUGES:
        assert read(name) == 0
    assert now("microvllm:kv_unused_slots") == 0
    assert now("microvllm:prefix_state_misses_total") == 0  # the model keeps no states


@on_the_engines_loop
async def test_what_the_prefix_cache_saves(engine: EngineClient, config: EngineConfig) -> None:
    length = 3 * config.block_size + 1
    ids = [(7 * i) % 300 for i in range(length)]
    async with serving(engine) as http:
        before = await scrape(http)
        for _ in range(2):
            await http.post(GENERATE, json=wish(ids, 2))
        now = await scrape(http)
    saved = length - 1
    assert now.engine("prompt_tokens_total") == 2 * length
    assert now.engine("prompt_tokens_cached_total") == saved
    assert now.engine("prompt_tokens_by_source_total", source="local_cache_hit") == saved
    assert now.engine("prompt_tokens_by_source_total", source="local_compute") == 2 * length - saved
    assert now.engine("request_prefill_kv_computed_tokens_sum") == 2 * length - saved

    def rise(name: str) -> float:
        return now.engine(name) - before.engine(name)

    assert rise("prefix_cache_queries_total") == 2 * length
    assert rise("prefix_cache_hits_total") == saved
    assert rise("prompt_tokens_cached_by_source_total") == saved


@on_the_engines_loop
async def test_gauges_rise_and_are_back_at_zero_after_aborts(engine: EngineClient) -> None:
    async with serving(engine) as http:
        endless = SamplingParams(max_tokens=LONG // 2, ignore_eos=True)
        streams = [engine.submit([i] * 40, endless) for i in range(6)]
        await wait_until_async(
            lambda: (engine.stats.num_running, engine.stats.num_waiting) == (4, 2), "two wait for the others"
        )
        busy = await scrape(http)
        assert busy.engine("num_requests_running") == 4
        assert busy.engine("num_requests_waiting") == 2
        assert busy.engine("num_requests_waiting_by_reason", reason="capacity") == 2
        assert busy.engine("num_requests_waiting_by_reason", reason="deferred") == 0
        assert 0 < busy.engine("kv_cache_usage_perc") <= 1
        used = round(busy.engine("kv_cache_usage_perc") * engine.config.num_blocks)
        assert 0 <= busy("microvllm:kv_unused_slots") <= used * engine.config.block_size
        for (stream,) in streams:
            stream.abort()
        await wait_until_async(lambda: engine.stats.num_running == 0, "nothing is running")
        now = await scrape(http)
    for name in GAUGES:
        assert now.engine(name) == 0, name
    assert now("microvllm:kv_unused_slots") == 0
    assert now.engine("request_success_total", finished_reason="abort") == 6
    assert now.engine("e2e_request_latency_seconds_count") == 0


@on_the_engines_loop
async def test_an_existing_dashboard_finds_its_names_and_labels(engine: EngineClient) -> None:
    async with serving(engine) as http:
        now = await scrape(http)
    assert [name for name in DASHBOARD if name not in now.names] == []
    for sample in now.samples:
        if sample.name.startswith(("vllm:", "microvllm:")) and sample.name != "vllm:cache_config_info":
            assert sample.labels["model_name"] == "tiny"  # the first name, whatever a request says
            further = {"le", "source", "finished_reason", "reason", "part", "kind", "sleep_state"}
            expected = set() if sample.name == "vllm:admission_rejections_total" else {"engine"}
            assert set(sample.labels) - further == {"model_name"} | expected, sample
            assert sample.labels.get("engine", "0") == "0"
    (cache,) = [sample for sample in now.samples if sample.name == "vllm:cache_config_info"]
    config = engine.config
    assert cache.value == 1 and cache.labels["engine"] == "0"
    assert cache.labels["block_size"] == str(config.block_size)
    assert cache.labels["num_gpu_blocks"] == str(config.num_blocks)
    assert cache.labels["kv_cache_size_tokens"] == str(config.num_blocks * config.block_size)
    kinds = {family.name: family.type for family in now.families}
    assert kinds["vllm:iteration_tokens_total"] == kinds["vllm:request_params_n"] == "histogram"
    assert kinds["vllm:generation_tokens"] == "counter" and kinds["vllm:kv_cache_usage_perc"] == "gauge"
    assert {"process_resident_memory_bytes", "python_info"} <= now.names
    assert all(family.documentation for family in now.families)


@on_the_engines_loop
async def test_buckets_are_vllms(engine: EngineClient) -> None:
    async with serving(engine) as http:
        now = await scrape(http)

    def bounds(name: str) -> list[str]:
        return [s.labels["le"] for s in now.samples if s.name == f"vllm:{name}_bucket"]

    tokens = [f"{digit}.0" for digit in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)]
    tokens.append("+Inf")
    assert bounds("request_prompt_tokens") == bounds("request_generation_tokens") == tokens
    assert bounds("iteration_tokens_total")[:3] == ["1.0", "8.0", "16.0"]
    assert bounds("iteration_tokens_total")[-2:] == ["16384.0", "+Inf"]
    assert bounds("time_to_first_token_seconds")[:2] == ["0.001", "0.005"]
    assert len(bounds("time_to_first_token_seconds")) == 23
    assert bounds("inter_token_latency_seconds") == bounds("request_time_per_output_token_seconds")
    assert len(bounds("inter_token_latency_seconds")) == 20
    assert bounds("e2e_request_latency_seconds")[-2:] == ["7680.0", "+Inf"]
    assert len(bounds("e2e_request_latency_seconds")) == 22
