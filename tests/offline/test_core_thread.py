"""Callers in several threads, and interrupts: one engine, right answers, nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from model_tools import make_engine, variant_folder
from process_tools import wait_until

from microvllm import LLM, SamplingParams
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import EngineError, InvalidRequestError

PROMPTS = ["The quick brown fox", "The cache keeps", "0 1 2 3", "世界", "x", "What is"]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
LENGTH = 40
LONG_WAIT_S = 300


@pytest.fixture(autouse=True)
def no_endless_test() -> Iterator[None]:
    """An engine that hangs must fail its test, not hold up all others."""

    def give_up(*_: object) -> None:
        raise TimeoutError("the engine hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LONG_WAIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(
        str(variant_folder("llama-tied")),
        dtype="float32",
        cpu_threads=1,
        num_gpu_blocks_override=256,
        max_num_seqs=8,
        async_scheduling=request.param,
    )


def assert_at_rest(engine: InferenceEngine) -> None:
    assert not engine.core.has_work() and engine.core.kv.num_used == 0
    engine.core.kv.check()
    assert engine.core.stats().num_running == engine.core.stats().num_waiting == 0


def stream(engine: InferenceEngine, prompt: str, max_tokens: int = LENGTH) -> str:
    return "".join(text for _, text in engine.stream_generate(prompt, max_tokens, **GREEDY))


def complete(llm: LLM, prompt: str, max_tokens: int = LENGTH) -> str:
    params = SamplingParams(max_tokens=max_tokens, **GREEDY)
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].text


# ---- threads --------------------------------------------------------------------------------------


def test_every_thread_gets_the_answer_that_it_gets_alone(llm: LLM) -> None:
    """Whole answers, streams, streams that are left early and wrong requests, all at once."""
    engine = llm.engine
    alone = {prompt: complete(llm, prompt) for prompt in PROMPTS}

    def work(number: int) -> None:
        prompt = PROMPTS[number % len(PROMPTS)]
        kind = number // len(PROMPTS) % 5
        if kind == 0:
            assert complete(llm, prompt) == alone[prompt]
        elif kind == 1:
            assert stream(engine, prompt) == alone[prompt]
        elif kind == 2:
            assert engine.generate(PROMPTS, LENGTH, **GREEDY) == alone
        elif kind == 3:
            pairs = itertools.islice(engine.stream_generate(prompt, 400, **GREEDY), 3)
            assert alone[prompt].startswith("".join(text for _, text in pairs))
        else:
            with pytest.raises(InvalidRequestError):
                engine.generate(prompt, 0)

    with ThreadPoolExecutor(6) as threads:
        for outcome in [threads.submit(work, number) for number in range(60)]:
            outcome.result()
    assert_at_rest(engine)


def test_threads_share_steps(llm: LLM) -> None:
    """They are one batch, not one after the other."""
    before = llm.engine.core.stats().steps
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda prompt: complete(llm, prompt, 100), PROMPTS[:4]))
    assert llm.engine.core.stats().steps - before < 3 * 100


def test_a_stream_that_nobody_reads_computes_nothing(llm: LLM) -> None:
    one = llm.engine.stream_generate(PROMPTS[0], 400, **GREEDY)
    next(one)
    before = llm.engine.core.stats().steps
    time.sleep(0.2)
    assert llm.engine.core.stats().steps == before
    text = stream(llm.engine, PROMPTS[1])  # one goes along in these steps, and loses nothing
    rest = "".join(text for _, text in itertools.islice(one, LENGTH - 1))
    assert complete(llm, PROMPTS[0]).endswith(rest) and text == complete(llm, PROMPTS[1])
    one.close()  # type: ignore[attr-defined]
    assert_at_rest(llm.engine)


def test_an_abandoned_stream_of_another_thread_is_ended(llm: LLM) -> None:
    kept: list[Any] = []

    def work() -> None:
        kept.append(llm.engine.stream_generate(PROMPTS[0], 400, **GREEDY))
        next(kept[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert llm.engine.core.stats().num_running == 1
    kept.clear()
    assert_at_rest(llm.engine)


def test_several_engines_in_one_process() -> None:
    engines = [make_engine(variant_folder(name)) for name in ("llama-tied", "qwen3", "qwen2")]
    alone = [engine.generate(PROMPTS, LENGTH, **GREEDY) for engine in engines]
    with ThreadPoolExecutor(len(engines)) as threads:
        for _ in range(3):
            together = threads.map(lambda engine: engine.generate(PROMPTS, LENGTH, **GREEDY), engines)
            assert list(together) == alone


def test_the_prefix_cache_may_be_reset_while_others_generate(llm: LLM) -> None:
    prompt = "The cache keeps what it has seen. " * 5
    alone = complete(llm, prompt)
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(complete, llm, prompt) for _ in range(20)]
        resets = [threads.submit(llm.reset_prefix_cache) for _ in range(20)]
        assert {answer.result() for answer in answers} == {alone}
        assert all(reset.result() for reset in resets)
    assert_at_rest(llm.engine)


def test_an_engine_that_failed_says_so_to_every_caller_and_for_good() -> None:
    engine = make_engine(variant_folder("llama-tied"))
    started = threading.Barrier(2)

    def broken(step: object) -> None:
        raise EngineError("the GPU failed: unspecified launch failure")

    def work(prompt: str) -> str:
        tokens = engine.stream_generate(prompt, 400, **GREEDY)
        next(tokens)
        started.wait()
        engine.core._runner.collect = broken  # type: ignore[method-assign, assignment]
        return "".join(text for _, text in tokens)

    with ThreadPoolExecutor(2) as threads:
        for outcome in [threads.submit(work, prompt) for prompt in PROMPTS[:2]]:
            with pytest.raises(EngineError, match="unspecified launch failure"):
                outcome.result()
    with pytest.raises(EngineError, match="unspecified launch failure"):
        engine.generate("x")


# ---- interrupts -----------------------------------------------------------------------------------


def interrupted(action: Callable[[], object], *delays_s: float) -> bool:
    """Whether an interrupt, sent to this process after each of the delays, got out of the action."""

    def send() -> None:
        for delay in delays_s:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    got_out = False
    try:
        sender.start()
        action()
    except KeyboardInterrupt:
        got_out = True
    while True:
        try:
            sender.join()
            time.sleep(0.02)  # the last one may still be on its way
            break
        except KeyboardInterrupt:  # it came too late, or it is not the first
            pass
    return got_out


def consume(llm: LLM) -> None:
    for _ in llm.engine.stream_generate(PROMPTS[0], 400, **GREEDY):
        pass


ACTIONS: dict[str, Callable[[LLM], object]] = {
    "LLM.generate": lambda llm: llm.generate(
        PROMPTS * 4, SamplingParams(max_tokens=400, **GREEDY), use_tqdm=False
    ),
    "with a progress bar": lambda llm: llm.generate(PROMPTS, SamplingParams(max_tokens=400, **GREEDY)),
    "LLM.chat": lambda llm: llm.chat(
        [{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=400, **GREEDY), use_tqdm=False
    ),
    "generate": lambda llm: llm.engine.generate(PROMPTS, 400, **GREEDY),
    "stream_generate": consume,
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_interrupt_ends_the_call_and_nothing_else(llm: LLM, name: str) -> None:
    expected = complete(llm, PROMPTS[0])
    moments = random.Random(7)
    hits = 0
    for _ in range(12):
        hits += interrupted(lambda: ACTIONS[name](llm), moments.uniform(0, 0.15))
        assert_at_rest(llm.engine)
    assert hits >= 6, "the calls were over before the interrupts came"
    assert complete(llm, PROMPTS[0]) == expected


def test_interrupts_in_quick_succession(llm: LLM) -> None:
    expected = complete(llm, PROMPTS[0])
    moments = random.Random(8)
    for _ in range(25):
        later = [moments.choice((0, 1e-5, 1e-4, 1e-3)) for _ in range(3)]
        interrupted(lambda: ACTIONS["LLM.generate"](llm), moments.uniform(0, 0.05), *later)
        wait_until(lambda: not llm.engine.core.has_work(), "the requests have ended")
        assert_at_rest(llm.engine)
    assert complete(llm, PROMPTS[0]) == expected


def test_an_interrupt_leaves_the_requests_of_other_threads(llm: LLM) -> None:
    alone = complete(llm, PROMPTS[1], 150)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(complete, llm, PROMPTS[1], 150)
        interrupted(lambda: ACTIONS["LLM.generate"](llm), 0.05)
        assert other.result() == alone
    assert_at_rest(llm.engine)


def test_an_exception_from_a_signal_handler_is_like_an_interrupt(llm: LLM) -> None:
    """A deadline by SIGALRM, as evaluation harnesses set one."""

    class Deadline(Exception):
        pass

    def expire(*_: object) -> None:
        raise Deadline

    before = signal.signal(signal.SIGALRM, expire)
    try:
        for delay in (0.01, 0.03, 0.06):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(Deadline):
                ACTIONS["LLM.generate"](llm)
            assert_at_rest(llm.engine)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_does_not_wait_for_a_long_step() -> None:
    engine = make_engine(variant_folder("llama-tied"))
    expected = stream(engine, PROMPTS[0])
    runner: Any = engine.core._runner
    collect, entered, go_on = runner.collect, threading.Event(), threading.Event()

    def slow(step: Any) -> Any:
        entered.set()
        go_on.wait()
        return collect(step)

    runner.collect = slow
    start = time.monotonic()
    assert interrupted(lambda: engine.generate(PROMPTS, 400, **GREEDY), 0.1)
    assert entered.is_set() and time.monotonic() - start < 30
    assert engine.core.kv.num_used > 0  # the step that runs still writes there
    runner.collect = collect
    go_on.set()
    assert stream(engine, PROMPTS[0]) == expected
    assert_at_rest(engine)


# ---- how the thread ends --------------------------------------------------------------------------


def engine_threads() -> int:
    return sum(thread.name == "microvllm-engine" for thread in threading.enumerate())


def test_the_thread_ends_with_its_engine() -> None:
    """And its memory comes free at once, without the garbage collector."""
    before = engine_threads()
    llm = LLM(str(variant_folder("llama-tied")), cpu_threads=1)
    complete(llm, PROMPTS[0], 3)
    stream(llm.engine, PROMPTS[0], 3)
    core = weakref.ref(llm.engine.core)
    assert engine_threads() == before + 1
    gc.disable()
    try:
        del llm
        assert engine_threads() == before and core() is None
    finally:
        gc.enable()


def run_script(text: str, **options: Any) -> subprocess.CompletedProcess[str]:
    folder = str(variant_folder("llama-tied"))
    head = f"import os, microvllm\nengine = microvllm.InferenceEngine({folder!r}, cpu_threads=1)\n"
    return subprocess.run(
        [sys.executable, "-c", head + text], capture_output=True, text=True, timeout=LONG_WAIT_S, **options
    )


def test_a_forked_process_is_told_that_the_engine_stayed_behind_and_a_script_may_end_in_a_stream() -> None:
    done = run_script(
        "engine.generate('x', 3)\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        engine.generate('x', 3)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "stream = engine.stream_generate('x', 400, ignore_eos=True)\n"
        "print(next(stream)[0] >= 0)\n"
    )
    told, streamed = done.stdout.splitlines()
    assert told.startswith("EngineError") and "forked" in told
    assert (done.returncode, streamed, done.stderr) == (0, "True", "")


def test_generate_in_the_terminal_ends_at_an_interrupt() -> None:
    command = [
        sys.executable,
        "-m",
        "microvllm.cli",
        "generate",
        "x",
        "--model",
        str(variant_folder("llama-tied")),
    ]
    options = ["--max-tokens", "100000", "--ignore-eos", "--cpu-threads", "1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 130 and b"Traceback" not in errors
