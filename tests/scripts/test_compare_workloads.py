"""The comparison of engines: what is asked of them, and how servers are started, halted and ended."""

from __future__ import annotations

import math
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
from bench.engines import Engine
from bench.servers import Server, busy_neighbour, stop_all
from bench.workloads import WORKLOADS, Case, Sizes, cases_of, nano_lengths
from compare_case import needs_proc, script_engine, state_of
from http_tools import eventually

from microvllm.openai_compat.bench.client import BenchError, Completion, Conversation
from microvllm.openai_compat.bench.workloads import Span


def test_nano256_has_the_lengths_of_nano_vllms_benchmark() -> None:
    """Its README tells the sum of the answers."""
    (case,) = WORKLOADS["nano256"](Sizes())
    assert sum(output for _, output in case.lengths) == 133_966
    assert (len(case.lengths), case.concurrency, case.request_rate) == (256, 256, math.inf)
    assert case.lengths == nano_lengths()
    assert {100 <= length <= 1024 for pair in case.lengths for length in pair} == {True}


@pytest.mark.parametrize(
    ("name", "requests", "prompts", "answers", "at_once"),
    [
        ("single", 4, Span(128, 512), Span(500, 500), 1),
        ("concurrent35", 35, Span(128, 512), Span(500, 500), 35),
        ("prefill1000", 4, Span(1000, 1000), Span(1, 1), 1),
    ],
)
def test_the_workloads_as_they_are_described(
    name: str, requests: int, prompts: Span, answers: Span, at_once: int
) -> None:
    (case,) = WORKLOADS[name](Sizes())
    assert (len(case.lengths), case.at_once, case.arrivals(0)) == (requests, at_once, [])
    for prompt, answer in case.lengths:
        assert prompts.low <= prompt <= prompts.high and answers.low <= answer <= answers.high
    users = case.users("ids", 3)
    assert [(len(u.prompt), u.output_len) for u in users if isinstance(u, Completion)] == list(case.lengths)
    assert case == WORKLOADS[name](Sizes())[0] != WORKLOADS[name](Sizes(quick=True))[0]


@pytest.mark.parametrize("tokens", [4000, 7900])
def test_a_long_prompt_is_one_request_on_a_cpu_too(tokens: int) -> None:
    for quick in (False, True):
        (case,) = WORKLOADS[f"prefill{tokens}"](Sizes(quick=quick))
        assert (case.lengths, case.at_once, case.prefill_only) == (((tokens, 1),), 1, True)


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_prompts_differ_in_and_between_rounds_and_repeat_by_seed(kind: str) -> None:
    case = Case("w", "l", ((32, 4),) * 50, concurrency=1)
    prompts = [str(user) for user in case.users(kind, 1)]
    assert prompts == [str(user) for user in case.users(kind, 1)]
    assert len(set(prompts) | {str(user) for user in case.users(kind, 2)}) == 100
    for user in case.users(kind, 1):
        assert isinstance(user, Completion)
        assert len(user.prompt.split() if isinstance(user.prompt, str) else user.prompt) == 32


def test_the_users_of_a_chat_share_their_beginning_and_nothing_else() -> None:
    (case,) = WORKLOADS["chat"](Sizes())
    users = case.users("text", 5)
    assert len(users) == case.at_once == 16
    talks = [user for user in users if isinstance(user, Conversation)]
    assert len({talk.system for talk in talks}) == 1 and len(talks[0].system.split()) == case.shared_len
    assert len({message for talk in talks for message in talk.messages}) == 16 * case.turns
    assert case.longest > case.shared_len + case.turns * 128


def test_arrivals_are_a_poisson_process_and_the_same_for_every_engine() -> None:
    case = Case("sweep", "l", ((1, 1),) * 4000, request_rate=8.0)
    times = case.arrivals(1)
    assert times == case.arrivals(1) != case.arrivals(2)
    gaps = np.diff([0.0, *times])
    assert fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert pstdev(gaps) == pytest.approx(1 / 8, rel=0.1), "of an exponential distribution"
    steady = Case("sweep", "l", ((1, 1),) * 4000, request_rate=8.0, burstiness=100.0).arrivals(1)
    assert pstdev(np.diff(steady)) == pytest.approx(1 / 80, rel=0.1)


def test_sizes_replace_a_workloads_own_and_a_neighbour_doubles_the_cases() -> None:
    sizes = Sizes(streams=[1, 8], input_len=Span(5, 5), output_len=Span(7, 7), request_rates=[3.0])
    cases = cases_of(["streams", "sweep"], sizes, busy=True)
    assert [str(case) for case in cases[:3]] == [
        "streams, 1 stream",
        "streams, 8 streams",
        "sweep, 3 requests/s",
    ]
    assert [str(case) for case in cases[3:]] == [f"{case}, busy neighbour" for case in cases[:3]]
    assert {length for case in cases for length in case.lengths} == {(5, 7)}
    assert cases[1].shortened(2).lengths == ((5, 2),) * 8
    assert cases[1].shortened(9, 3).lengths == ((5, 7),) * 3
    assert Case("single", "l", ((9, 7),) * 3, concurrency=1).shortened(2, 5).lengths == ((9, 2),)
    chat = Case("chat", "l", ((10, 4), (20, 4)), turns=3, shared_len=100)
    assert (chat.work, chat.shortened(1, 9).work, chat.shortened(1).turns) == (119, 67, 3)


@needs_proc
def test_a_server_is_halted_resumed_and_ended_with_all_its_processes(tmp_path: Path) -> None:
    server = Server(script_engine("one"), tmp_path)
    try:
        server.wait_ready(60)
        processes = server.processes()
        assert len(processes) == 2
        assert 0 < server.ready_s < 60
        assert server.memory() > 1e6
        assert server.cpu_seconds() > 0
        server.halt()
        eventually(lambda: {state_of(process) for process in processes} == {"T"})
        server.resume()
        eventually(lambda: "T" not in {state_of(process) for process in processes})
        server.halt()
    finally:
        stop_all([server])
    assert server.processes() == [] and server.ended()
    assert all(state_of(process) in ("", "Z") for process in processes)


@needs_proc
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            script_engine("one", program="print('a\\nb', flush=True); raise SystemExit('no such model')"),
            "ended while it started: a / b / no such model",
        ),
        (script_engine("one", program="import time; time.sleep(60)"), "no answer within 0.3 s"),
        (Engine("one", "1", "f32", ["/no/such/program"]), "cannot start /no/such/program"),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path: Path, engine: Engine, message: str) -> None:
    with ExitStack() as stack, pytest.raises(BenchError, match=message):
        server = Server(engine, tmp_path)
        stack.callback(server.stop)
        server.wait_ready(60 if "ended" in message else 0.3)


@needs_proc
def test_a_busy_neighbour_takes_processor_time_while_the_block_runs() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    before = children()
    with busy_neighbour():
        (process,) = children() - before
        stat = Path(f"/proc/{process}/stat")
        end = time.monotonic() + 60
        while int(stat.read_text().rpartition(")")[2].split()[11]) < 20:  # hundredths of a second
            assert time.monotonic() < end, "it rests"
            time.sleep(0.01)
    assert children() == before
