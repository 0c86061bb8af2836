"""Invariant kernels: a row of a product, or a token of attention, has the same bits beside any others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from random import Random

import pytest
import torch
from kernel_case import EMULATED, LEVELS, library_of
from quantized_case import FACTORS, quantized, random_blocks
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, SegmentTable
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.cpu.tuning import Tuning

# Whatever calibration may measure.
TUNINGS = [Tuning(fetches_once=few > 1, few_rows=few, matrix_rows=2 * few) for few in (0, 1, 3, 4)]
COLUMNS = 1280  # more than are added up one by one
FORMATS = ("F32", "BF16", *sorted(FACTORS))


@pytest.fixture(scope="module", params=[*LEVELS, EMULATED], ids=lambda level: level.name)
def operators(request: pytest.FixtureRequest) -> list[CpuOperators]:
    """For each of `TUNINGS` (of `EMULATED` for two) exact ones, then such that round activations to 8 bits.

    Of every level that this processor has, and with the matrix unit in plain C.
    """
    library = library_of(request.param)
    # There, at half of this file's time, whatever is not rounded goes to the unit, however it is tuned.
    tunings = TUNINGS[1:3] if request.param is EMULATED else TUNINGS
    return [
        CpuOperators(library, 1 + i % 3, rounds_x, tuning, is_invariant=True)
        for rounds_x in (False, True)
        for i, tuning in enumerate(tunings)
    ]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str, *parts: int) -> Tensor:
    """So many rows in each part."""
    if name == "F32" or name == "BF16":
        weight = normal(sum(parts), COLUMNS, seed=len(parts))
        return weight if name == "F32" else weight.bfloat16()
    blocks = COLUMNS // (256 if name.endswith(("K", "XS")) else 32)
    return quantized(*((name, random_blocks(name, rows, blocks, i)) for i, rows in enumerate(parts)))


@pytest.mark.parametrize("rounds_x", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_alone_and_among_others(operators: list[CpuOperators], name: str, rounds_x: bool) -> None:
    weight, gate_up = weight_of(name, 40), weight_of(name, 18, 18)
    most = 131 if name in ("F32", "BF16") else 35  # a block and its rest; some tiles
    x, norm = normal(most, COLUMNS, seed=1), normal(COLUMNS, seed=2)
    residual, bias = normal(most, 40, seed=3), normal(40, seed=4)
    expected: list[Tensor] = []
    for each in operators:
        if each.int8_activations != rounds_x:
            continue
        linear, gated = each.linear(weight, bias), each.norm_gate_up(norm, 1e-5, gate_up)

        def products(begin: int, end: int) -> list[Tensor]:
            return [linear(x[begin:end], residual[begin:end].clone()), gated(x[begin:end])]  # noqa: B023

        if not expected:
            expected = [
                torch.cat(rows) for rows in zip(*(products(i, i + 1) for i in range(most)), strict=True)
            ]
        for rows in (0, 1, 2, 3, 4, 5, 6, 12, 13, most):
            for y, alone in zip(products(most - rows, most), expected, strict=True):
                assert torch.equal(y, alone[most - rows :]), (each.tuning.few_rows, rows)


class Sequences:
    """Random queries, keys and values of some sequences, whose blocks lie anywhere in the pool."""

    BLOCK = 16

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, lengths: list[int], random: Random) -> None:
        self.shape, self.dtype, self.lengths = shape, dtype, lengths
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = [normal(length, width, seed=i) for i, length in enumerate(lengths)]
        sizes = [-(-length // self.BLOCK) for length in lengths]
        free = random.sample(range(sum(sizes)), sum(sizes))
        self.blocks = [[free.pop() for _ in range(size)] for size in sizes]

    def attend(self, operators: CpuOperators, steps: Iterable[dict[int, int]]) -> list[Tensor]:
        """The outputs of all tokens. steps: how many tokens of which sequences come next."""
        shape = self.shape
        inv_freq = 100.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        num_blocks, width = sum(map(len, self.blocks)), max(map(len, self.blocks))
        backend = operators.attention(
            AttentionConfig(shape, num_blocks, self.BLOCK, inv_freq, max(self.lengths), self.dtype)
        )
        outputs: list[list[Tensor]] = [[] for _ in self.lengths]
        done = [0] * len(self.lengths)
        for step in steps:
            order = sorted(step, key=lambda i: step[i] > 1)
            spans = {i: (done[i], done[i] + step[i]) for i in order}
            decodes = sum(count == 1 for count in step.values())
            tokens = [(i, position) for i in order for position in range(*spans[i])]
            blocks = torch.tensor([self.blocks[i] + [0] * (width - len(self.blocks[i])) for i in order])
            contexts = torch.tensor([spans[i][1] for i in order])
            many = SegmentTable(
                torch.tensor([0, *accumulate(step[i] for i in order[decodes:])]),
                contexts[decodes:],
                blocks[decodes:],
                max(step.values()),
            )
            batch = AttentionBatch(
                torch.tensor([position for _, position in tokens]),
                torch.tensor(
                    [self.blocks[i][p // self.BLOCK] * self.BLOCK + p % self.BLOCK for i, p in tokens]
                ),
                decodes,
                blocks[:decodes],
                contexts[:decodes],
                many,
            )
            qkv = torch.cat([self.qkv[i][slice(*spans[i])] for i in order])
            rows = backend.begin_step(batch)(0, qkv)
            for i, out in zip(order, rows.split([step[i] for i in order]), strict=True):
                outputs[i].append(out)
                done[i] += step[i]
        assert done == self.lengths
        return [torch.cat(parts) for parts in outputs]


def cut(lengths: list[int], random: Random) -> Iterable[dict[int, int]]:
    """Chunks of any size of any sequences, until all are done."""
    left = dict(enumerate(lengths))
    while left:
        step = {i: min(left[i], random.choice((1, 1, 3, 40, 150))) for i in left if random.random() < 0.7}
        if step:
            yield step
        left = {i: rest for i in left if (rest := left[i] - step.get(i, 0))}


@pytest.mark.parametrize(
    ("heads", "window", "dtype"),
    [
        ((9, 3), None, torch.bfloat16),
        ((14, 2), None, torch.float32),
        ((4, 4), 50, torch.bfloat16),
        ((9, 3), 140, torch.float32),
    ],
)
def test_a_token_however_its_sequence_is_cut(
    operators: list[CpuOperators], heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    """Over the borders of the chunks that decodes are split into, alone and beside others."""
    random = Random(repr((heads, window)))
    sequences = Sequences(AttentionShape(1, *heads, 40, window), dtype, [300, 131, 7], random)
    expected = None
    for each in operators[:2]:
        whole = [{0: 300, 1: 131, 2: 7}]
        for steps in (whole, [{i: n} for i, n in whole[0].items()], cut(sequences.lengths, random)):
            outputs = sequences.attend(each, steps)
            expected = expected or outputs
            assert all(map(torch.equal, outputs, expected))
