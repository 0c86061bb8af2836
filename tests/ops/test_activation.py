"""A row of an activation has the same bits whatever rows are computed with it."""

from __future__ import annotations

import pytest
import torch

from microvllm.ops.activation import ACTIVATIONS, CLAMPED, VECTOR, activated, by_row, sigmoid, tanh

PLAIN = {"sigmoid": sigmoid, "tanh": tanh}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, CLAMPED, *PLAIN])
def test_a_row_has_the_same_bits_in_any_company(name: str, gated: bool) -> None:
    if name in (CLAMPED, *PLAIN) and gated != (name == CLAMPED):
        pytest.skip("is the one or the other")
    function = PLAIN.get(name) or activated(lambda x: x, name, gated=gated)
    for width in (1, 6, 24, VECTOR - 1, VECTOR, VECTOR + 1, 100):
        x = torch.randn(13, width * (1 + gated), generator=torch.manual_seed(width)) * 3
        for first, stop in ((0, 13), (0, 1), (3, 8)):
            together = function(x[first:stop])
            assert together.shape == (stop - first, width) and together.is_contiguous()
            alone = torch.cat([function(x[i : i + 1]) for i in range(first, stop)])
            assert torch.equal(together, alone), (width, first, stop)


def test_torch_itself_rounds_what_its_vectors_leave_otherwise() -> None:
    """Which is what these functions are for: without it the test above could not fail."""
    x = torch.randn(4096, 1, generator=torch.manual_seed(0))
    assert not torch.equal(x.sigmoid(), torch.cat([row.sigmoid() for row in x])[:, None])


def test_rows_on_a_gpu_are_computed_as_they_are() -> None:
    """Without the three kernels more that padding takes: a shared expert's gate has one column a layer."""
    given = list[torch.Tensor]()

    def noting(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return x

    halves = torch.empty(3, 2 * VECTOR, device="meta").chunk(2, dim=-1)
    for x in (torch.empty(3, 1, device="meta"), halves[0]):
        assert by_row(noting, strided=False)(x) is x is given[-1]
