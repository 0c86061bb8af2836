"""What configurations graphs of rules and of long prompts are left out for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from fakes import make_config

import triton_interpreter  # noqa: F401  # isort: skip  (first, as it chooses how kernels run)

from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.latent import LatentAttention
from microvllm.adapters.layers.short_conv import ShortConv
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.ops.gpu.levers import VARIABLE
from microvllm.ops.routing import Routing
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.worker.graph_levers import graph_levers

LATENT = LatentAttention(
    num_heads=2, rank=8, rope_dim=4, nope_dim=4, value_dim=4, q_rank=None, rope=RopeSpec(), scale=1.0
)
LAYERS: dict[str, dict[str, Any]] = {
    "latent": {"mixer": LATENT},
    "states": {"mixer": ShortConv(channels=8, conv_size=3)},
    "experts": {"mlp": Experts(count=4, size=8, routing=Routing(num_chosen=2))},
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def chosen(config: EngineConfig) -> tuple[bool, bool]:
    levers = graph_levers(config)
    assert (levers.prompt_tokens(1000) > 0) == levers.long_prompts
    return levers.rules, levers.long_prompts


def on_a_gpu(**options: Any) -> EngineConfig:
    return make_config(device="cuda", attention_backend="triton", **options)


@pytest.mark.parametrize("windows", [(None,), (16, None)], ids=["alike", "windows"])
def test_both_are_in_use(windows: tuple[int | None, ...]) -> None:
    assert chosen(on_a_gpu(windows=windows)) == (True, True)


@pytest.mark.parametrize("kind", LAYERS)
def test_long_prompts_are_of_dense_models_of_attention_alone(kind: str) -> None:
    """One other layer is enough."""
    config = on_a_gpu()
    other = msgspec.structs.replace(config.spec.layers[0], **LAYERS[kind])
    spec = msgspec.structs.replace(config.spec, layers=(*config.spec.layers, other))
    assert chosen(msgspec.structs.replace(config, spec=spec)) == (True, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tensor_parallel_size": 2}, (False, False)),
        ({"attention_backend": "flash_attn"}, (True, False)),
        ({"batch_invariant": True}, (False, False)),
        ({"enforce_eager": True}, (False, False)),
    ],
    ids=str,
)
def test_what_was_not_measured_goes_without(options: dict[str, Any], expected: tuple[bool, bool]) -> None:
    assert chosen(msgspec.structs.replace(on_a_gpu(), **options)) == expected


def test_both_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "rules,long_prompts")
    assert chosen(on_a_gpu()) == (False, False)
