"""How a request ends that is cut short: by its client, by a stop of the server, or from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from process_tools import PATIENCE_S

from microvllm.openai_compat.errors import ClientGoneError, ServerStoppingError
from microvllm.openai_compat.transport.lifecycle import ON_DISCONNECT, Lifecycle
from microvllm.openai_compat.transport.protocol import Flag, Flow, Pipeline

pytestmark = pytest.mark.asyncio


class Connection:
    """The end of a connection that a request sees in its scope."""

    def __init__(self, open_: bool = True) -> None:
        self.open = open_
        self.callback: Callable[[], None] | None = None
        self.scope = {ON_DISCONNECT: self.on_disconnect}

    def on_disconnect(self, callback: Callable[[], None] | None) -> bool:
        self.callback = callback
        return self.open

    def leave(self) -> None:
        self.open = False
        if self.callback is not None:
            self.callback()


class Work:
    """Waits until it is released, and notes how it ended."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.begun = self.cancelled = False

    async def run(self) -> str:
        self.begun = True
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            await asyncio.sleep(0)  # it takes a moment to clean up
            raise
        return "done"


async def run(work: Work, scope: dict[str, Any], lifecycle: Lifecycle) -> str:
    with lifecycle.interruptible(scope):
        return await work.run()


async def begin(work: Work, scope: dict[str, Any], lifecycle: Lifecycle) -> asyncio.Task[str]:
    task = asyncio.ensure_future(run(work, scope, lifecycle))
    await asyncio.sleep(0)
    return task


async def test_work_ends_by_itself() -> None:
    connection, work = Connection(), Work()
    task = await begin(work, connection.scope, Lifecycle())
    work.released.set()
    assert await task == "done"
    assert connection.callback is None, (
        "the connection would hold the request, and cancel what comes after it"
    )


async def test_a_client_that_leaves_cancels_its_work_before_the_caller_goes_on() -> None:
    connection, work = Connection(), Work()
    task = await begin(work, connection.scope, Lifecycle())
    connection.leave()
    with pytest.raises(ClientGoneError):
        await task
    assert work.cancelled


async def test_a_client_that_has_left_before_gets_no_work_done() -> None:
    work = Work()
    task = await begin(work, Connection(open_=False).scope, Lifecycle())
    with pytest.raises(ClientGoneError):
        await task
    assert not work.begun


async def test_a_stop_ends_what_runs_and_what_comes_later() -> None:
    lifecycle, work, later = Lifecycle(), Work(), Work()
    task = await begin(work, Connection().scope, lifecycle)
    without_a_client = await begin(later, {}, lifecycle)
    lifecycle.cut()
    for each in (task, without_a_client):
        with pytest.raises(ServerStoppingError):
            await each
    assert work.cancelled and later.cancelled
    with pytest.raises(ServerStoppingError):
        await run(Work(), {}, lifecycle)


async def test_a_cancellation_from_outside_stays_one() -> None:
    work = Work()
    task = await begin(work, Connection().scope, Lifecycle())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.cancelled and task.cancelled()


async def test_the_caller_can_go_on_awaiting_after_its_work_was_cut() -> None:
    connection, work = Connection(), Work()

    async def request() -> str:
        try:
            await run(work, connection.scope, Lifecycle())
        except ClientGoneError:
            await asyncio.wait_for(asyncio.sleep(0.01), PATIENCE_S)
        return "cleaned up"

    task = asyncio.ensure_future(request())
    await asyncio.sleep(0)
    connection.leave()
    connection.leave()
    assert await task == "cleaned up"


async def test_a_client_that_leaves_as_its_work_ends() -> None:
    """Both in one turn of the loop: either outcome is right, a cancellation that comes later is not."""
    for leaves_first in (False, True):
        connection, work = Connection(), Work()

        async def request(work: Work = work, scope: dict[str, Any] = connection.scope) -> str:
            try:
                found = await run(work, scope, Lifecycle())
            except ClientGoneError:
                found = "gone"
            await asyncio.sleep(0.01)
            return found

        task = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        for action in (connection.leave, work.released.set)[:: 1 if leaves_first else -1]:
            action()
        assert await task in ("done", "gone")


async def test_the_work_s_own_error_is_raised() -> None:
    with pytest.raises(ValueError, match="a fault"), Lifecycle().interruptible(Connection().scope):
        raise ValueError("a fault")


async def test_a_flag_is_an_event() -> None:
    flag = Flag()
    waiting = [asyncio.ensure_future(flag.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    flag.set()
    await asyncio.wait_for(asyncio.gather(*waiting[1:]), PATIENCE_S)
    assert waiting[0].cancelled() and flag.is_set()
    await flag.wait()
    flag.clear()
    late = asyncio.ensure_future(flag.wait())
    await asyncio.sleep(0)
    assert not flag.is_set() and not late.done()
    flag.set()
    await late


async def test_flow_control_waits_for_the_transport() -> None:
    flow = Flow(asyncio.Transport())
    await flow.drain()
    flow.pause_writing()
    blocked = asyncio.ensure_future(flow.drain())
    await asyncio.sleep(0)
    assert not blocked.done()
    flow.resume_writing()
    await asyncio.wait_for(blocked, PATIENCE_S)


async def test_a_pipeline_gives_out_what_came_first() -> None:
    pipeline = Pipeline()
    assert not pipeline
    for item in (1, 2):
        pipeline.appendleft(item)
    assert (pipeline.pop(), pipeline.pop()) == (1, 2)
