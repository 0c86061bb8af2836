"""Chat templates in child processes: limits of time and memory, new children, and what passes through."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process
from process_tools import PATIENCE_S
from template_bombs import bombs

from microvllm.runtime.errors import EngineError, InvalidRequestError
from microvllm.runtime.text.chat_template import ChatTemplate
from microvllm.runtime.text.template_process import SandboxProcesses

BOMBS = list(bombs())  # scripts/faults.py template_bombs tries them all against a server
CHOSEN = sorted({*BOMBS[::9], *dict(reversed(BOMBS)).items()})  # and the first of every kind
COMPARISON = BOMBS[0][1]  # one call into C that never returns
SHOW = "{{ x }}"


def pids(sandbox: SandboxProcesses) -> list[int]:
    return [child._process.pid for child in sandbox._running]


def wait_for_end(pid: int) -> None:
    """Until it is a zombie or gone: its command line is empty earlier, while its files are still open."""
    deadline = time.monotonic() + PATIENCE_S
    while state_of(pid) not in ("Z", "X", None):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.fixture(scope="module")
def strict() -> SandboxProcesses:
    return SandboxProcesses(children=1, deadline_s=0.3, memory_bytes=256 << 20)


@pytest.fixture
def patient(strict: SandboxProcesses, monkeypatch: pytest.MonkeyPatch) -> SandboxProcesses:
    """The same processes, with time enough for what is no bomb on a busy machine, too."""
    monkeypatch.setattr(strict, "_deadline_s", PATIENCE_S)
    return strict


@pytest.mark.parametrize(("kind", "source"), CHOSEN)
def test_a_bomb_is_answered_and_the_next_request_served(
    strict: SandboxProcesses, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
) -> None:
    with pytest.raises(InvalidRequestError, match=r"still running|was killed|failed \(|compile"):
        strict.render(source, {"messages": [{"role": "user", "content": "hi"}]})
    monkeypatch.setattr(strict, "_deadline_s", PATIENCE_S)
    assert strict.render(SHOW, {"x": kind}) == kind


def test_what_the_imports_map_is_not_counted() -> None:
    """NumPy maps memory for each core of the machine: a limit on all of it would fail on a large one."""
    small = SandboxProcesses(children=1, deadline_s=PATIENCE_S, memory_bytes=32 << 20)
    assert small.render(SHOW, {"x": "hi"}) == "hi"
    with pytest.raises(InvalidRequestError):
        small.render("{{ 'x' * (64 * 1024 * 1024) }}", {})


def test_there_are_many_bombs() -> None:
    assert len({source for _, source in BOMBS}) >= 111


def test_a_bomb_at_compile_time_leaves_a_model_without_chat(strict: SandboxProcesses) -> None:
    template = ChatTemplate(BOMBS[-1][1], {}, strict)
    assert template.error is not None and "template" in template.error
    with pytest.raises(InvalidRequestError, match="chat template"):
        template.render([{"role": "user", "content": "hi"}])


async def test_health_and_other_chats_are_answered_meanwhile() -> None:
    client = FakeClient()
    source = "{% if messages[0].content == 'bomb' %}" + COMPARISON + "{% endif %}fine"
    client.processor.template = ChatTemplate(source, {}, SandboxProcesses(deadline_s=2))

    async with in_process(client) as http:

        async def chat(content: str) -> Any:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return await http.post("/v1/chat/completions", json=body)

        assert (await chat("hi")).status_code == 200
        bomb = asyncio.ensure_future(chat("bomb"))
        answers = []
        while not bomb.done():
            answers.append((await http.get("/health")).status_code)
            answers.append((await chat("hi")).status_code)
        assert len(answers) > 2 and set(answers) == {200}
        refused = await bomb
        assert refused.status_code == 400 and "still running after 2 s" in refused.text


@pytest.mark.parametrize(
    "value",
    [123456789012345678901234567890, -1.5, True, None, "\ud800", "\0", "日本 é", {"b": [1, {"a": ""}]}],
)
def test_values_pass_unchanged(patient: SandboxProcesses, value: Any) -> None:
    assert patient.render(SHOW, {"x": value}) == str(value)


def test_values_that_cannot_pass_are_named(patient: SandboxProcesses) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot take a value: .*objects of type object"):
        patient.render(SHOW, {"x": object()})
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        patient.render(SHOW, {"x": deep})


def test_long_texts_pass_and_endless_ones_do_not() -> None:
    sandbox = SandboxProcesses(children=1, max_chars=3_000_000)
    assert sandbox.render(SHOW, {"x": "é" * 3_000_000}) == "é" * 3_000_000
    with pytest.raises(InvalidRequestError, match="more than 3000000 characters"):
        sandbox.render(SHOW, {"x": "é" * 3_000_001})


def test_an_interrupted_call_leaves_no_answer_for_the_next_one() -> None:
    sandbox = SandboxProcesses(children=1)
    sandbox.content_format(SHOW)

    class Interrupt(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupt):
            sandbox.render(
                "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", {}
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sandbox.render(SHOW, {"x": "new"}) == "new"


def test_a_child_that_was_killed_is_replaced() -> None:
    sandbox = SandboxProcesses(children=1)
    sandbox.content_format(SHOW)
    (pid,) = pids(sandbox)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    assert sandbox.render(SHOW, {"x": 1}) == "1" and pids(sandbox) != [pid]


def test_no_process_is_an_error_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = SandboxProcesses(children=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        for _ in range(2):
            with pytest.raises(EngineError, match="no process for chat templates"):
                sandbox.render(SHOW, {"x": 1})
    assert sandbox.render(SHOW, {"x": 1}) == "1"


def test_the_children_go_with_their_owner() -> None:
    sandbox = SandboxProcesses()
    sandbox.content_format(SHOW)
    before = pids(sandbox)
    assert len(before) == 2
    del sandbox
    for pid in before:
        wait_for_end(pid)


def test_no_child_outlives_a_parent_that_was_killed() -> None:
    """Not even in the middle of a template that the parent would have stopped."""
    code = f"""
import threading, time
from microvllm.runtime.text.template_process import SandboxProcesses
sandbox = SandboxProcesses(deadline_s=1)
sandbox.content_format("")
sandbox.content_format("")
print(*(child._process.pid for child in sandbox._running), flush=True)
threading.Thread(target=sandbox.render, args=({COMPARISON!r}, {{}})).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.3)
        parent.kill()
    assert len(children) == 2
    for pid in children:
        wait_for_end(pid)
