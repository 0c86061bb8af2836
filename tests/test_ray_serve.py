"""Replicas on a local Ray: requests, streams, a replica killed under load, scaling and draining.

Ray is not among what the tests install: `scripts/check_ray` runs this file.
"""

from __future__ import annotations

import json
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import click
import httpx
import pytest
from model_tools import make_engine, variant_folder
from process_tools import wait_until

from microvllm.runtime.errors import ConfigError

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    # Not "ray", as which any folder of that name on the path is imported.
    serve = pytest.importorskip("ray.serve", reason="scripts/check_ray installs it")
    import ray

    from microvllm.openai_compat import ray_serve

pytestmark = pytest.mark.filterwarnings("ignore")
PATIENCE_S = 120.0
PROMPT = "an old tree"


def options(**more: Any) -> dict[str, str]:
    """What `serve run` reads of its command line: texts."""
    given = {
        **{
            "model": variant_folder("llama-tied"),
            "served_model_name": "m",
            "dtype": "float32",
            "device": "cpu",
        },
        **{"cpu_threads": 1, "max_model_len": 512, "num_gpu_blocks_override": 1024, "shutdown_timeout": 60},
        **more,
    }
    return {name: str(value) for name, value in given.items()}


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """The address of Ray's proxy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(base: str) -> str:
    """Two replicas."""
    serve.run(ray_serve.app(options(min_replicas=2)), name="two", route_prefix="/two")
    return f"{base}/two"


def replicas(name: str) -> list[str]:
    """The names of an application's actors that hold an engine."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if f"::{name}#EngineReplica#" in actor["name"])


def complete(url: str, max_tokens: int, prompt: str = PROMPT) -> httpx.Response:
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)


def stream(url: str, max_tokens: int, prompt: str = PROMPT, begun: Event | None = None) -> list[str]:
    """The data of each event."""
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    found = []
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=PATIENCE_S
    ) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(line.removeprefix("data: "))
                if begun is not None:
                    begun.set()
    return found


def text_of(events: list[str]) -> str:
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def test_a_request_and_a_stream(url: str) -> None:
    expected = make_engine(variant_folder("llama-tied")).generate(
        PROMPT, 30, temperature=0.0, ignore_eos=True
    )
    answer = complete(url, 30)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected[PROMPT]
    events = stream(url, 30)
    assert events[-1] == "[DONE]" and text_of(events) == expected[PROMPT]
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "m"


def test_an_error_is_the_application_s(url: str) -> None:
    assert complete(url, 10_000).status_code == 400
    wrong = httpx.post(f"{url}/v1/completions", content=b"{")
    assert wrong.status_code == 400 and "error" in wrong.json()
    absent = httpx.get(f"{url}/v1/nothing")
    assert absent.status_code == 404 and "error" in absent.json()


def test_what_a_client_leaves_ends(url: str) -> None:
    """Both replicas come to rest although the tokens that were requested would take longer."""

    def running() -> float:
        found = [httpx.get(f"{url}/metrics").text for _ in range(6)]  # of either replica
        lines = [line for text in found for line in text.splitlines()]
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    body = {"model": "m", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 8}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        next(answer.iter_lines())
    start = time.monotonic()
    wait_until(lambda: running() == 0, "the request has ended")
    ended = [httpx.get(f"{url}/metrics").text for _ in range(6)]
    assert any(
        'finished_reason="abort"' in line and not line.endswith(" 0.0")
        for text in ended
        for line in text.splitlines()
    ), f"it was not aborted, but ended after {time.monotonic() - start:.1f} s"


def test_a_killed_replica_loses_only_what_had_begun_to_stream(url: str) -> None:
    before, begun = replicas("two"), Event()
    assert len(before) == 2
    with ThreadPoolExecutor(40) as clients:
        streams = [clients.submit(stream, url, 300, f"tale {i}", begun) for i in range(8)]
        whole = [clients.submit(complete, url, 400, f"story {i}") for i in range(32)]
        assert begun.wait(PATIENCE_S)
        time.sleep(0.2)
        ray.kill(ray.get_actor(before[0], namespace="serve"), no_restart=False)
        answers = [each.result() for each in whole]
        texts = [each.result() for each in streams]
    assert [answer.status_code for answer in answers] == [200] * 32
    assert all(answer.json()["usage"]["completion_tokens"] == 400 for answer in answers)
    cut = [events for events in texts if events[-1] != "[DONE]"]
    assert all("error" in json.loads(events[-1]) and len(events) > 1 for events in cut)
    assert len(cut) < len(texts)
    wait_until(lambda: len(replicas("two")) == 2 and replicas("two") != before, "the replica is replaced")
    assert complete(url, 5).status_code == 200


def test_waiting_requests_start_a_replica_and_a_deleted_application_finishes_what_runs(base: str) -> None:
    url = f"{base}/one"
    scale = options(
        max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0.5, front_replicas=1, max_num_seqs=2
    )
    serve.run(ray_serve.app(scale), name="one", route_prefix="/one")
    assert len(replicas("one")) == 1
    done = Event()

    def load() -> None:
        while not done.is_set():
            assert complete(url, 400).status_code == 200

    with ThreadPoolExecutor(12) as clients:
        loads = [clients.submit(load) for _ in range(10)]
        wait_until(lambda: len(replicas("one")) == 2, "there is a second replica")
        done.set()
        for each in loads:
            each.result()
        begun = Event()
        last = clients.submit(stream, url, 480, PROMPT, begun)
        assert begun.wait(PATIENCE_S)
        serve.delete("one")
        assert last.result()[-1] == "[DONE]"
    assert not replicas("one")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"port": 8000}, "--port"),
        ({"ssl_certfile": "x"}, "--ssl-certfile"),
        ({"max_model_lenn": 5}, "--max-model-lenn"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below min_replicas 3"),
        ({"min_replicas": "many"}, "min_replicas"),
        ({"model": ""}, "no model was given"),
    ],
)
def test_a_wrong_option_is_named(more: dict[str, Any], problem: str) -> None:
    with pytest.raises((ConfigError, click.UsageError)) as error:
        ray_serve.app(options(**more))
    assert problem in f"{error.value} {getattr(error.value, 'message', '')}"


def test_a_replica_takes_a_gpu_for_each_rank() -> None:
    built = ray_serve.app({"model": "m", "tensor_parallel_size": "2"})
    front = built._bound_deployment
    replica = front.init_args[0]._bound_deployment
    assert replica.ray_actor_options == {"num_cpus": 2.0, "num_gpus": 2.0}
    config = replica._replica_config
    assert config.placement_group_bundles == [{"CPU": 2.0, "GPU": 2.0}]
    assert config.placement_group_strategy == "STRICT_PACK"
