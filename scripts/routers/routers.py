"""The routers: what to install, and how each is started in front of the replicas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Replica:
    """A running server: its address, and where it publishes KV events and repeats them."""

    url: str
    events: str
    replay: str


@dataclass(frozen=True)
class Setup:
    """What a router is started with. metrics_port: for its own figures."""

    programs: Path
    folder: Path
    port: int
    metrics_port: int
    replicas: list[Replica]
    model: str

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas]


@dataclass(frozen=True)
class Router:
    """`packages`, the first of which is the router; its command for a policy.

    policies: the first sends requests in turns, the others look at prefixes.
    """

    packages: tuple[str, ...]
    policies: tuple[str, ...]
    command: Callable[[Setup, str], list[str]]
    environment: Mapping[str, str] | None = None


def gateway(setup: Setup, policy: str) -> list[str]:
    """Smg, and sglang-router, which it comes from."""
    listen = ["--host", "127.0.0.1", "--port", str(setup.port)]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(setup.metrics_port)]
    program = str(setup.programs / "smg")
    return [program, "launch", *listen, *metrics, "--worker-urls", *setup.urls, "--policy", policy]


def vllm_router(setup: Setup, policy: str) -> list[str]:
    program = str(setup.programs / "vllm-router")
    listen = ["--host", "127.0.0.1", "--port", str(setup.port)]
    metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(setup.metrics_port)]
    command = [program, *listen, *metrics, "--worker-urls", *setup.urls, "--policy", policy]
    if policy == "kv_aware":
        for replica in setup.replicas:
            command += ["--kv-event-source", f"{replica.url}={replica.events}"]
            command += ["--kv-event-replay-source", f"{replica.url}={replica.replay}"]
        command += ["--kv-event-block-size", str(BLOCK_SIZE), "--kv-event-model", setup.model]
    return command


def litellm(setup: Setup, policy: str) -> list[str]:
    models = [
        {
            "model_name": setup.model,
            "litellm_params": {
                "model": f"hosted_vllm/{setup.model}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in setup.urls
    ]
    config = {
        "model_list": models,
        "router_settings": {"routing_strategy": policy},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
    }
    file = setup.folder / "litellm.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    program = str(setup.programs / "litellm")
    return [program, "--config", str(file), "--host", "127.0.0.1", "--port", str(setup.port)]


ROUTERS: Mapping[str, Router] = {
    "smg": Router(("smg",), ("round_robin", "cache_aware"), gateway),
    "sglang-router": Router(("sglang-router",), ("round_robin", "cache_aware"), gateway),
    "vllm-router": Router(("vllm-router",), ("round_robin", "cache_aware", "kv_aware"), vllm_router),
    "litellm": Router(
        ("litellm[proxy]",),
        ("simple-shuffle",),  # it looks at no prefix
        litellm,
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
}
