"""How a step is padded for a captured size. That a replay computes what an eager step does: tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvllm.runtime.worker.step_inputs import StepArrays
from microvllm.runtime.worker.step_sizes import SEGMENTS, StepSize, step_sizes

PADDING_ROW = 99


@st.composite
def steps(draw: st.DrawFn) -> StepArrays:
    pools = draw(st.integers(1, 3))
    decodes = draw(st.integers(0, 40))
    lengths = [1] * decodes + draw(st.lists(st.integers(2, 300), max_size=SEGMENTS))
    total = sum(lengths)
    values = np.arange(1, total + 1)
    requests = np.arange(len(lengths))
    context = np.array(lengths, dtype=np.int64) + draw(st.integers(0, 50))
    slots = values + 5000 * np.arange(1, pools + 1)[:, None]
    return StepArrays(values, values % 7, values + 1000, slots, requests, np.array(lengths), context, decodes)


@given(steps())
def test_padding_writes_nothing_and_reads_nothing(arrays: StepArrays) -> None:
    sizes = step_sizes(40, 4096, groups=len(arrays.slots))
    size = next((size for size in sizes if size.fits(arrays)), None)
    decodes, total = arrays.num_decodes, len(arrays.ids)
    if size is None:
        assert total - decodes > 1024
        return
    staged = size.staged(arrays, PADDING_ROW)
    ids, rows, positions, context, request_rows, starts, *slots = (staged[field] for field in size.fields())
    real = np.r_[0:decodes, size.decodes : size.decodes + total - decodes]
    padding = np.setdiff1d(np.arange(len(ids)), real)
    for padded, values in (
        (ids, arrays.ids),
        (rows, arrays.rows),
        (positions, arrays.positions),
        *zip(slots, arrays.slots, strict=True),
    ):
        assert (padded[real] == values).all()
    assert all((each[padding] == -1).all() for each in slots) and (rows[padding] == PADDING_ROW).all()

    segments = len(arrays.lengths) - decodes
    real = np.r_[0:decodes, size.decodes : size.decodes + segments]
    padding = np.setdiff1d(np.arange(len(context)), real)
    assert (context[real] == arrays.context).all() and (context[padding] == 0).all()
    assert (request_rows[real] == arrays.request_rows).all() and (request_rows[padding] == PADDING_ROW).all()
    assert (np.diff(starts) == [*arrays.lengths[decodes:], *[0] * (SEGMENTS - segments)]).all()


def test_fields_are_aligned_and_apart() -> None:
    for size in step_sizes(5, 100, groups=3):
        end = 0
        for field in size.fields():
            assert field.start >= end and field.start % 4 == 0
            end = field.stop


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "decodes", "tokens"),
    [(256, 8192, [0, 32, 256], 1024), (8, 300, [0, 8], 256), (1, 8, [0, 1], None)],
)
def test_sizes_keep_within_the_engine_s_limits(
    max_num_seqs: int, budget: int, decodes: list[int], tokens: int | None
) -> None:
    sizes = step_sizes(max_num_seqs, budget)
    assert max((size.tokens for size in sizes), default=None) == tokens
    assert sorted({size.decodes for size in sizes}) == (decodes if tokens else [])


def test_a_small_model_has_larger_sizes_with_no_decodes_or_all() -> None:
    sizes = step_sizes(256, 8192, 5000)
    larger = [(size.decodes, size.tokens) for size in sizes if size.tokens > 1024]
    assert {decodes for decodes, _ in larger} == {0, 256} and max(larger)[1] == 3072
    assert [size for size in sizes if size.tokens <= 1024] == step_sizes(256, 8192)
    assert max(size.tokens for size in step_sizes(256, 3000, 5000)) == 2560, "within the budget"
    assert step_sizes(256, 8192, 0) == step_sizes(256, 8192)


def test_more_segments_than_there_is_room_for_do_not_fit() -> None:
    count = SEGMENTS + 1
    twos = np.full(count, 2)
    values = np.arange(2 * count)
    arrays = StepArrays(values, values, values, values[None], np.arange(count), twos, twos, 0)
    assert not StepSize(0, 1024).fits(arrays)
