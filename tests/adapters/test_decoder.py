"""The decoder computes what its spec says, also for layers that no family has: each against plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from model_tools import BACKENDS, relative_error
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.family import HF_TENSORS
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.rotary import inverse_frequencies
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec
from microvllm.adapters.tensors import WHOLE, LayerWeights, Shard, Slot, matrix_slots
from microvllm.ops.activation import ACTIVATIONS
from microvllm.ops.attention import AttentionBatch, SegmentTable
from microvllm.ops.backends import make_operators
from microvllm.ops.norm import rms_norm
from microvllm.ops.operators import LinearOperator, Norm, Operator, Operators
from microvllm.ops.rotary import RotaryTable, apply_rotary

TOKENS, EPS = 13, 1e-5
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeSpec())
LAYERS: dict[str, dict[str, Any]] = {
    "swiglu": {"mlp": MLP(size=48)},
    "gelu": {"mlp": MLP(size=48, activation="gelu", gated=False, bias=True)},
    "relu2": {"mlp": MLP(size=48, activation="relu2", gated=False)},
    "geglu": {"mlp": MLP(size=48, activation="gelu_tanh", bias=True)},
    "four-norms": {"mlp": MLP(size=48), "post_norms": True},
    "norms-behind": {"mlp": MLP(size=48), "pre_norms": False, "post_norms": True},
    "no-norms": {"mlp": MLP(size=48), "pre_norms": False},
}


def model_spec(layer: LayerSpec, **options: Any) -> ModelSpec:
    return ModelSpec(
        architecture="",
        vocab_size=40,
        hidden_size=32,
        layers=(layer, msgspec.structs.replace(layer, mixer=ATTENTION)),
        max_position=64,
        rms_norm_eps=EPS,
        **options,
    )


def random_weights(spec: ModelSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        slot.name: torch.randn(slot.shape, generator=generator) * (slot.shape[-1] ** -0.5)
        + float("norm" in slot.name)
        for slot in spec.slots(HF_TENSORS)
    }


def reference(spec: ModelSpec, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    hidden = weights["embed"][ids]
    for index, layer in enumerate(spec.layers):
        own = {key.removeprefix(f"layers.{index}."): value for key, value in weights.items()}

        def normed(x: Tensor, name: str, own: dict[str, Tensor] = own) -> Tensor:
            return rms_norm(x, own[name], EPS) if name in own else x

        attended = attention(layer.mixer, own, normed(hidden, "mixer_norm"))
        hidden = hidden + normed(attended, "mixer_post_norm")
        x, act = normed(hidden, "mlp_norm"), ACTIVATIONS[layer.mlp.activation]
        if layer.mlp.gated:
            gate, up = linear(x, own["gate_up"], own.get("gate_up_bias")).chunk(2, -1)
            inner = act(gate) * up
        else:
            inner = act(linear(x, own["up"], own.get("up_bias")))
        hidden = hidden + normed(linear(inner, own["down"], own.get("down_bias")), "mlp_post_norm")
    return linear(rms_norm(hidden, weights["norm"], EPS), weights["lm_head"])


def attention(mixer: Attention, own: dict[str, Tensor], x: Tensor) -> Tensor:
    qkv = linear(x, own["qkv"]).view(len(x), -1, mixer.head_dim)
    rotation = RotaryTable(inverse_frequencies(mixer.rope, mixer.head_dim), len(x), torch.float32)
    heads, kv_heads, at = mixer.num_heads, mixer.num_kv_heads, torch.arange(len(x))
    qk = apply_rotary(qkv[:, : heads + kv_heads], *rotation.at(at))
    q, k, v = (each.transpose(0, 1) for each in (qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]))
    seen = (at[:, None] >= at) & (at[:, None] - at < (mixer.window or len(x)))
    out = scaled_dot_product_attention(q, k, v, seen, scale=mixer.scale, enable_gqa=True)
    return linear(out.transpose(0, 1).reshape(len(x), -1), own["o"])


def forward(spec: ModelSpec, weights: dict[str, Tensor], ids: Tensor, backend: str) -> Tensor:
    model = DecoderModel(spec, dict(weights), make_operators(backend, torch.float32, 1))
    groups = len(spec.cache_plan.windows)
    backend_attention = model.attention(4 * groups, 4, 64, torch.float32, torch.device("cpu"))
    at, n = torch.arange(len(ids)), len(ids)
    batch, *others = (
        AttentionBatch(
            at,
            16 * group + at,
            0,
            torch.zeros(0, 0, dtype=torch.int64),
            at[:0],
            SegmentTable(torch.tensor([0, n]), torch.tensor([n]), 4 * group + torch.arange(4)[None], n),
        )
        for group in range(groups)
    )
    batch = replace(batch, others=tuple(others))
    return model.logits(model.forward(ids, backend_attention.begin_step(batch)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_make(name: str, backend: str) -> None:
    """The second layer has another attention than the first: a window, a scale, a rotation."""
    mixer = msgspec.structs.replace(ATTENTION, window=5, scale=0.3, rope=RopeSpec(theta=500.0))
    spec = model_spec(LayerSpec(mixer=mixer, **LAYERS[name]))
    weights = random_weights(spec)
    ids = torch.arange(TOKENS) * 7 % spec.vocab_size
    expected = reference(spec, weights, ids)
    assert relative_error(forward(spec, weights, ids, backend), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_grow_with_their_position(backend: str) -> None:
    """The same as other products of q, as long as all positions are in one period of the temperature."""
    layer = LayerSpec(mixer=ATTENTION, mlp=MLP(size=48))
    weights = random_weights(model_spec(layer))
    ids = torch.arange(TOKENS)

    def tempered(length: int) -> Tensor:
        return forward(model_spec(layer.with_mixer(temperature=(0.7, length))), weights, ids, backend)

    plain = forward(model_spec(layer), weights, ids, backend)
    assert relative_error(tempered(TOKENS), plain) < 1e-6
    late = tempered(6)
    assert relative_error(late[:6], plain[:6]) < 1e-6
    assert relative_error(late[6:], plain[6:]) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_and_caps_of_a_model(backend: str) -> None:
    spec = model_spec(LayerSpec(mixer=ATTENTION, mlp=MLP(size=48)))
    weights = random_weights(spec)
    ids = torch.arange(TOKENS)
    plain = forward(spec, weights, ids, backend)
    capped = msgspec.structs.replace(spec, logits_softcap=0.5)
    error = relative_error(forward(capped, weights, ids, backend), (plain / 0.5).tanh() * 0.5)
    assert error < 1e-6
    scaled = msgspec.structs.replace(spec, embedding_scale=3.0)
    tripled = {**weights, "embed": weights["embed"] * 3.0}
    error = relative_error(forward(scaled, weights, ids, backend), forward(spec, tripled, ids, backend))
    assert error < 1e-6
    less = {name: w - 1.0 if "norm" in name else w for name, w in weights.items()}
    offset = msgspec.structs.replace(spec, norm_offset=1.0)
    assert relative_error(forward(offset, less, ids, backend), plain) < 1e-5


class Experts(msgspec.Struct, frozen=True):
    """A new kind of MLP, as its own file would define it: the best of some SwiGLUs for each token."""

    size: int = 48
    count: int = 3

    def slots(self, hidden_size: int, names: Any, shard: Shard) -> Iterator[Slot]:
        hidden, inner = WHOLE.share(hidden_size), WHOLE.share(self.size)
        yield from matrix_slots("router", {"router": WHOLE.share(self.count)}, hidden)
        for i in range(self.count):
            yield from matrix_slots(f"experts.{i}.gate_up", {"gate": inner, "up": inner}, hidden)
            yield from matrix_slots(f"experts.{i}.down", {"down": hidden}, inner)

    def build(
        self, weights: LayerWeights, norm: Norm | None, operators: Operators
    ) -> tuple[Operator, LinearOperator]:
        assert norm is not None
        weight, eps = norm
        router = operators.linear(*weights.matrix("router"))
        experts = [
            (
                operators.mlp_input(None, *weights.matrix(f"experts.{i}.gate_up"), "silu", True),
                operators.linear(*weights.matrix(f"experts.{i}.down")),
            )
            for i in range(self.count)
        ]

        def compute(x: Tensor, residual: Tensor | None = None) -> Tensor:
            best = router(x).argmax(-1)
            y = torch.zeros_like(x)
            for i, (inner, down) in enumerate(experts):
                rows = (best == i).nonzero().view(-1)
                y[rows] = down(inner(x[rows]))
            return y if residual is None else residual + y

        return lambda x: operators.rms_norm(x, weight, eps), compute


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_kind_of_mlp_changes_nothing_else(backend: str) -> None:
    mlp: Any = Experts()
    spec = model_spec(LayerSpec(mixer=ATTENTION, mlp=mlp))
    weights = random_weights(spec)
    ids = torch.arange(TOKENS)
    chosen = forward(spec, weights, ids, backend)
    # Of equal experts the choice is none: the same as one dense MLP.
    for layer in range(2):
        for i, name in itertools.product(range(3), ("gate_up", "down")):
            weights[f"layers.{layer}.experts.{i}.{name}"] = weights[f"layers.{layer}.experts.0.{name}"]
            weights[f"layers.{layer}.{name}"] = weights[f"layers.{layer}.experts.0.{name}"]
    dense = model_spec(LayerSpec(mixer=ATTENTION, mlp=MLP(size=48)))
    expected = reference(dense, weights, ids)
    assert relative_error(forward(spec, weights, ids, backend), expected) < 1e-5
    assert relative_error(chosen, expected) > 1e-2


def test_a_spec_survives_the_way_to_the_engine_process() -> None:
    spec = model_spec(LayerSpec(mixer=ATTENTION, **LAYERS["gelu"]), logits_softcap=3.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec) == spec
