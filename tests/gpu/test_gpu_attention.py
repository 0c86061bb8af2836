"""The attention backends of a GPU at the sizes of real models, in half precision and in CUDA graphs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from attention_case import Case, relative_error
from torch import Tensor
from triton_interpreter import DEVICE

from microvllm.ops.attention import AttentionShape
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.flash_backend import FlashAttention
from microvllm.ops.attention.triton_backend import TritonAttention
from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.levers import Levers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")]

SHAPES = {
    "qwen2-7b": (AttentionShape(2, 28, 4, 128), False),
    "qwen3-0.6b": (AttentionShape(2, 16, 8, 128), True),
    "qwen2.5-0.5b": (AttentionShape(2, 14, 2, 64), False),
    "smollm2-135m": (AttentionShape(2, 9, 3, 64), False),
    "llama-3-8b": (AttentionShape(2, 32, 8, 128), False),
    "mistral-window": (AttentionShape(2, 32, 8, 128, 256), False),
    "yarn": (AttentionShape(2, 28, 4, 128, None, 1.14), False),
}
# Relative error of the output. Inputs are exact in the dtype; q, k and the weights are rounded to it.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# flash_attn rotates by cos and sin in the dtype.
FLASH_TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DECODES = [600, 1, 0, 17, 1023, 256, 257, 64, 65, 0, 333, 2]
SEGMENTS = [(300, 300), (100, 1111), (0, 0), (1, 1), (17, 500), (64, 64)]


def make_backend(name: str, case: Case) -> TritonAttention | FlashAttention:
    config = case.config(DEVICE)
    if name == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("needs the package flash-attn")
        flash = FlashAttention(config)
        flash.cache[:, :, :-1].copy_(case.cache.transpose(3, 4))
        return flash
    pdl = name == "triton-pdl"
    backend = TritonAttention(config, pdl=pdl, levers=Levers.of(DEVICE) if pdl else None)
    backend.cache.copy_(case.cache)
    return backend


def cache_of(backend: TritonAttention | FlashAttention) -> Tensor:
    if isinstance(backend, FlashAttention):
        return backend.cache[:, :, :-1].transpose(3, 4)
    return backend.cache


def backends() -> list[str]:
    names = ["triton", "flash"]
    return [*names, "triton-pdl"] if can_launch_early(DEVICE) else names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize("name", backends())
def test_a_mixed_step_of_a_real_model(name: str, model: str, dtype: torch.dtype) -> None:
    shape, with_norms = SHAPES[model]
    if dtype == torch.float32 and name != "triton":
        pytest.skip("no float32 there, or nothing new")
    block = {"flash": 256, "triton": 16, "triton-pdl": 64}[name]
    case = Case(shape, block, DECODES, SEGMENTS, dtype, with_norms=with_norms)
    backend = make_backend(name, case)
    out = backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    expected, cache = case.expected(1)
    real = torch.tensor([bool(s.context) for s in case.decodes] + [True] * (len(out) - len(DECODES)))
    tolerance = (FLASH_TOLERANCE if name == "flash" else TOLERANCE)[dtype]
    assert out.isfinite().all()
    # Every row on its own: an error in a few is not to be lost among thousands.
    errors = [relative_error(*rows) for rows in zip(out[real.to(DEVICE)].cpu(), expected[real], strict=True)]
    assert max(errors) < 3 * tolerance
    assert sum(errors) / len(errors) < tolerance
    assert relative_error(cache_of(backend), cache) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", list(SHAPES))
@pytest.mark.parametrize("name", [name for name in backends() if name != "flash"])
def test_a_mixed_step_with_a_cache_of_e4m3(name: str, model: str, dtype: torch.dtype) -> None:
    """Few sequences and, by other tilings, many; scales of one and others."""
    shape, with_norms = SHAPES[model]
    case = Case(
        shape,
        16 if name == "triton" else 64,
        DECODES,
        SEGMENTS,
        dtype,
        with_norms=with_norms,
        scales=(KVScales(), KVScales(0.02, 0.25)),
        cache_dtype=torch.float8_e4m3fn,
    )
    for layer in range(2):
        backend = make_backend(name, case)
        out = backend.begin_step(case.batch(DEVICE, int32=True))(layer, case.qkv.to(DEVICE))
        expected, cache = case.expected(layer)
        assert out.isfinite().all()
        # In the mean as without; a key at the middle between two numbers may be rounded to either of them.
        errors = [relative_error(*rows) for rows in zip(out.cpu(), expected, strict=True)]
        assert sum(errors) / len(errors) < TOLERANCE[dtype] + 1e-4
        assert max(errors) < 3 * TOLERANCE[dtype] + 0.02
        assert relative_error(cache_of(backend), cache) < 1e-3
    few = [*DECODES[:3], 600]
    case = Case(shape, 64, few, [], dtype, cache_dtype=torch.float8_e4m3fn, with_norms=with_norms)
    backend = make_backend(name, case)
    out = backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    assert relative_error(out, case.expected(1)[0]) < TOLERANCE[dtype] + 1e-3


@pytest.mark.parametrize("name", backends())
@pytest.mark.parametrize("copies", [1, 3])  # few sequences, and many
def test_a_captured_graph_takes_any_lengths(name: str, copies: int) -> None:
    """One graph, replayed with other lengths, tables, and inputs: equal to the same step without a graph."""
    shape, with_norms = SHAPES["qwen3-0.6b"]
    block = 256 if name == "flash" else 64
    lengths = [[5, 0, 700, 64], [900, 1, 0, 0], [0, 0, 0, 2000], [257, 256, 255, 1]]
    lengths = [each * copies for each in lengths]
    cases = [
        Case(shape, block, decodes, [], torch.bfloat16, with_norms=with_norms, seed=i)
        for i, decodes in enumerate(lengths)
    ]
    blocks = max(case.num_blocks for case in cases)
    width = 2048 // block + 2
    first = cases[2]
    for case in cases:
        case.norms = first.norms
    backend = make_backend(name, first)
    size = (*backend.cache.shape[:2], blocks + (name == "flash"), *backend.cache.shape[3:])
    backend.cache = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    if isinstance(backend, FlashAttention):
        backend.num_blocks = blocks
    batch = first.batch(DEVICE, int32=True)
    tables = torch.zeros(4 * copies, width, dtype=torch.int32, device=DEVICE)
    static = replace(batch, decode_blocks=tables)
    qkv = first.qkv.to(DEVICE)

    def step() -> list[Tensor]:
        attention = backend.begin_step(static)
        return [attention(layer, qkv) for layer in range(shape.num_layers)]

    step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for case in cases:
        values = case.batch(DEVICE, int32=True)
        static.positions.copy_(values.positions)
        static.slots.copy_(values.slots)
        static.decode_lens.copy_(values.decode_lens)
        tables.zero_()
        tables[:, : values.decode_blocks.shape[1]] = values.decode_blocks
        qkv.copy_(case.qkv)
        backend.cache.zero_()
        stored = case.cache if name != "flash" else case.cache.transpose(3, 4)
        backend.cache[:, :, : case.num_blocks].copy_(stored)
        graph.replay()
        replayed = [out.clone() for out in captured]
        for layer, out in enumerate(step()):
            torch.testing.assert_close(replayed[layer], out, rtol=0, atol=0)
            real = torch.tensor([bool(s.context) for s in case.decodes])
            assert relative_error(replayed[layer].cpu()[real], case.expected(layer)[0][real]) < 1.5e-2
