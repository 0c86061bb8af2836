"""Profiles of the engine process: written where the operator said, by the commands of a client over HTTP."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fake_client import FakeClient
from http_tools import in_process
from model_tools import LONG, long_folder
from process_tools import wait_until_async

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError, EngineDeadError
from microvllm.runtime.process.client import EngineClient
from microvllm.runtime.worker.profiler import ProfilerConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETION = {"prompt": "hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineClient]:
    args = EngineArgs(
        model=str(long_folder()), dtype="float32", cpu_threads=1, num_gpu_blocks_override=LONG // 16
    )
    client = await EngineClient.start(args.resolve())
    yield client
    await client.close()


def server(client: EngineClient, folder: Path, **options: Any) -> httpx.AsyncClient:
    config = ProfilerConfig.read(
        {
            "profiler": "torch",
            "torch_profiler_dir": str(folder),
            "torch_profiler_with_stack": False,
            **options,
        }
    )
    app = create_app(client, ServerArgs(profiler=config))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def events_of(file: Path) -> list[str]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [event.get("name", "") for event in json.loads(data)["traceEvents"]]


async def test_a_profile_holds_the_steps_between_its_start_and_its_stop(
    client: EngineClient, tmp_path: Path
) -> None:
    async with server(client, tmp_path / "new" / "folder") as http:
        await http.post("/v1/completions", json=COMPLETION)
        started = await http.post("/start_profile")
        answer = await http.post("/v1/completions", json=COMPLETION)
        stopped = await http.post("/stop_profile")
        again = await http.post("/v1/completions", json=COMPLETION)
    assert [(a.status_code, a.content) for a in (started, stopped)] == [(200, b"")] * 2
    assert answer.json()["choices"] == again.json()["choices"], "a profile changes no token"
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("engine-") and file.name.endswith(".pt.trace.json.gz")
    names = events_of(file)
    assert 4 <= names.count("engine step") <= 8 and any(name.startswith("aten::") for name in names)


async def test_a_prefix_and_a_plain_file(client: EngineClient, tmp_path: Path) -> None:
    async with server(client, tmp_path, torch_profiler_use_gzip=False) as http:
        body = {"profile_prefix": "mine", "model": "x", "prompt": "the bench's own body"}
        assert (await http.post("/start_profile", json=body)).status_code == 200
        assert (await http.post("/stop_profile", json=body)).status_code == 200
        for wrong in ("../up", "a/b", "", "x" * 200, 5):
            refused = await http.post("/start_profile", json={"profile_prefix": wrong})
            assert refused.status_code == 400 and "profile_prefix" in refused.json()["error"]["message"]
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("mine-") and file.suffix == ".json" and events_of(file)


@pytest.mark.parametrize("name", ["delay_iterations", "max_iterations", "profiler_kwargs"])
async def test_what_a_start_cannot_do_is_named(client: EngineClient, tmp_path: Path, name: str) -> None:
    async with server(client, tmp_path) as http:
        answer = await http.post("/start_profile", json={name: 3})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        assert (await http.post("/stop_profile")).status_code == 400, "nothing was started"


async def test_commands_out_of_order_are_refused(client: EngineClient, tmp_path: Path) -> None:
    async with server(client, tmp_path) as http:
        early = await http.post("/stop_profile")
        assert (await http.post("/start_profile")).status_code == 200
        twice = await http.post("/start_profile")
        assert (await http.post("/stop_profile")).status_code == 200
    assert (early.status_code, twice.status_code) == (400, 400)
    assert "No profile is running" in early.text and "running already" in twice.text
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_profile_that_cannot_be_written_harms_no_request(
    client: EngineClient, tmp_path: Path
) -> None:
    async with server(client, tmp_path / "gone") as http:
        assert (await http.post("/start_profile")).status_code == 200
        (tmp_path / "gone").rmdir()
        failed = await http.post("/stop_profile")
        assert failed.status_code == 500 and "the profile failed" in failed.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_an_engine_that_dies_takes_the_profile_with_it(client: EngineClient, tmp_path: Path) -> None:
    config = ProfilerConfig(profiler="torch", torch_profiler_dir=str(tmp_path))
    await client.start_profile(config)
    (replica,) = client.replicas
    assert replica.process is not None
    replica.process.kill()
    with pytest.raises(EngineDeadError):
        await client.stop_profile()
    await wait_until_async(client.healthy, "the engine serves again")
    async with server(client, tmp_path) as http:
        assert (await http.post("/stop_profile")).status_code == 400


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
async def test_without_the_flag_the_flag_is_named(path: str) -> None:
    async with in_process(FakeClient()) as http:
        answer = await http.post(path)
    assert answer.status_code == 400 and "--profiler-config" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"profiler": "cuda"}, "profiler"),
        ({"profiler": "torch"}, "torch_profiler_dir"),
        ({"torch_profiler_dir": "/tmp"}, "torch_profiler_dir"),
        ({"torch_profiler_with_stack": True}, "torch_profiler_with_stack"),
        ({"profiler": "torch", "torch_profiler_dir": "/dev/null/x"}, "/dev/null/x"),
        ({"profiler": "torch", "torch_profiler_dir": "t", "proton_mode": "x"}, "proton_mode"),
        ({"profiler": "torch", "torch_profiler_dir": "t", "max_iterations": 3}, "max_iterations"),
        ({"profiler": "torch", "torch_profiler_dir": "t", "torch_profiler_with_stack": "yes"}, "with_stack"),
    ],
)
async def test_a_wrong_configuration_is_one_line(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProfilerConfig.read(values)
    message = str(caught.value)
    assert message.startswith("--profiler-config: ") and problem in message and "\n" not in message


async def test_a_configuration_without_a_profiler_asks_for_none() -> None:
    assert ProfilerConfig.read({}) is None and ProfilerConfig.read({"profiler": None}) is None
