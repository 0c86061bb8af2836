"""The server's side of several ranks: they end as the engine falls asleep, and it ends with one that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from process_tools import PATIENCE_S, alive, own_engines, wait_until, wait_until_async
from tiny_models import make_hf_folder

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import EngineDeadError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.request import SamplingParams

PROMPT = [5, 70, 200, 31, 8]
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}


def ranks_of(engine: int) -> list[int]:
    """The processes of the other ranks that an engine process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == engine and b"rank_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


@pytest.mark.asyncio
async def test_ranks_sleep_with_their_engine_and_one_that_dies_has_it_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = tmp_path / "meeting"  # where the ranks find each other, in a folder for each engine
    meeting.mkdir()
    monkeypatch.setenv("TMPDIR", str(meeting))
    folder = make_hf_folder(tmp_path / "model", "qwen2", **SIZES, max_position_embeddings=8192)
    config = EngineArgs(
        model=str(folder), device="cpu", dtype="float32", tensor_parallel_size=2, num_gpu_blocks_override=512
    ).resolve()
    client = await EngineClient.start(config)
    try:
        params = SamplingParams(max_tokens=8000, temperature=0.0, ignore_eos=True)
        (first,) = [part async for part in client.submit(PROMPT, params.with_max_tokens(1))[0]]
        (engine,) = own_engines()
        await client.sleep(2)
        assert own_engines() == [engine] and ranks_of(engine) == [], "the other ranks' memory is free"
        await client.wake_up()
        (again,) = [part async for part in client.submit(PROMPT, params.with_max_tokens(1))[0]]
        assert own_engines() == [engine] and again.token_ids == first.token_ids
        streams = [client.submit(PROMPT, params)[0] for _ in range(2)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        (engine,) = own_engines()
        (rank,) = ranks_of(engine)
        started = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        assert time.monotonic() - started < PATIENCE_S
        assert f"rank 1 (process {rank}) died (killed by signal 9)" in capfd.readouterr().err
        await wait_until_async(client.healthy, "the engine is back")
        (delta, *_) = [part async for part in client.submit(PROMPT, params.with_max_tokens(3))[0]]
        assert delta.token_ids
        (engine,) = own_engines()
        (rank,) = ranks_of(engine)
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: not alive(rank), "the rank ends with its engine")

        def is_back() -> bool:
            return client.healthy() and own_engines() not in ([], [engine])

        await wait_until_async(is_back, "the engine is back again")
        (rank,) = ranks_of(own_engines()[0])
    finally:
        await client.close()
    wait_until(lambda: not alive(rank), "the rank ends with the server")
    assert not list(meeting.iterdir())
