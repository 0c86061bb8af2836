"""All layers in one call of the CPU kernels: the same numbers as operator by operator, and as plain torch."""

from __future__ import annotations

import gguf
import pytest
import torch
from attention_case import Case
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import examples
from quantized_case import dequantized, quantized

from microvllm.ops.attention import AttentionBackend, AttentionShape, StepAttention
from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.operators import MAX_KERNEL_ROWS_BF16, CpuLayers, CpuOperators
from microvllm.ops.operators import DecoderLayer, DecoderLayers, Operators, TorchOperators

# The last: each matrix of a GGUF file in a format of its own.
DTYPES = (torch.float32, torch.bfloat16, None)
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


class Decoder:
    """Layers of random weights, equal for every set of operators, and the attention of one step."""

    def __init__(self, case: Case, operators: Operators, dtype: torch.dtype | None, seed: int) -> None:
        shape = case.shape
        hidden, inner = (24, 40) if dtype else (64, 96)
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        def weight(k: int, *rows: int) -> torch.Tensor:
            """Numbers of `dtype` in the type that these operators compute with."""
            exact = random(sum(rows), k) * k**-0.5
            is_reference = isinstance(operators, TorchOperators)
            if dtype is not None:
                return exact.to(dtype).float() if is_reference else exact.to(dtype)
            names = (FORMATS[i] for i in torch.randint(len(FORMATS), (len(rows),), generator=generator))
            parts = [
                (name, gguf.quants.quantize(one.numpy(), gguf.GGMLQuantizationType[name]))
                for name, one in zip(names, exact.split(rows), strict=True)
            ]
            return torch.cat([dequantized(*one) for one in parts]) if is_reference else quantized(*parts)

        def norm() -> torch.Tensor:
            return random(hidden) * 0.2 + 1

        width = shape.num_heads * shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.layers = operators.layers(
            [
                DecoderLayer(
                    operators.norm_linear(
                        norm(), 1e-5, weight(hidden, width, kv_width, kv_width), random(width + 2 * kv_width)
                    ),
                    operators.linear(weight(width, hidden)),
                    operators.norm_gate_up(norm(), 1e-5, weight(hidden, inner, inner)),
                    operators.linear(weight(inner, hidden), random(hidden)),
                )
                for _ in range(shape.num_layers)
            ]
        )
        self.backend: AttentionBackend = operators.attention(case.config())
        self.hidden = random(case.num_tokens, hidden)
        self.batch = case.batch(torch.device("cpu"))

    def run(self, needed: torch.Tensor | None = None, *, apart: bool = False) -> torch.Tensor:
        """What comes out; `apart`: as if the step's attention were timed."""
        step: StepAttention = self.backend.begin_step(self.batch)
        return self.layers(self.hidden.clone(), (lambda *args: step(*args)) if apart else step, needed)


@pytest.fixture(scope="module")
def operators() -> CpuOperators:
    return CpuOperators(load_kernels(), 3, is_exact=True)


@examples(30)
@given(
    st.lists(st.integers(1, 40), max_size=6),
    st.lists(st.integers(1, 20), max_size=2),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_one_call_gives_what_the_operators_give(
    operators: CpuOperators,
    decodes: list[int],
    prompts: list[int],
    heads: tuple[int, int],
    with_norms: bool,
    dtype: torch.dtype | None,
    seed: int,
) -> None:
    if not decodes and not prompts:
        decodes = [1]
    segments = [(length, length + seed % 23) for length in prompts]
    case = Case(
        AttentionShape(3, *heads, 8 if dtype else 32),
        4,
        decodes,
        segments,
        torch.float32,
        with_norms=with_norms,
        seed=seed,
    )
    ours = Decoder(case, operators, dtype, seed)
    assert isinstance(ours.layers, CpuLayers)
    together, apart = ours.run(), ours.run(apart=True)
    assert torch.equal(together, apart)
    expected = Decoder(case, TorchOperators(torch.float32), dtype, seed).run()
    rounds = dtype == torch.bfloat16 and case.num_tokens > MAX_KERNEL_ROWS_BF16
    tolerance = (1e-2 if rounds else 1e-4) * float(expected.abs().max())
    assert float((together - expected).abs().max()) < tolerance
    needed = (torch.rand(case.num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.3).nonzero()[
        :, 0
    ]
    alone = ours.run(needed)
    assert alone.shape == (len(needed), expected.shape[1])
    assert torch.allclose(alone, expected[needed], rtol=0, atol=tolerance)


def test_more_rows_than_the_kernels_take_go_operator_by_operator(
    operators: CpuOperators, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(AttentionShape(2, 2, 1, 8), 4, [3, 9, 5], [], torch.float32)
    decoder = Decoder(case, operators, torch.float32, 0)
    assert isinstance(decoder.layers, CpuLayers)
    calls = []
    monkeypatch.setattr(DecoderLayers, "__call__", lambda *args: calls.append(args))
    decoder.run()
    assert not calls
    decoder.layers.max_rows = 2
    decoder.run()
    assert len(calls) == 1
