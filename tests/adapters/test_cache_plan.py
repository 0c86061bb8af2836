"""Which layers share a page of the KV cache, and where in it they lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microvllm.adapters.cache_plan import CachePlan

Layers = list[tuple[int | None, int, int]]


def interleaved(number: int, period: int, window: int = 512, size: int = 64, dim: int = 16) -> Layers:
    """The last layer of each period has no window."""
    return [(window if (index + 1) % period else None, size, dim) for index in range(number)]


def test_layers_of_one_window_fill_a_page() -> None:
    plan = CachePlan.of([(None, 64, 16)] * 5)
    assert (plan.windows, plan.page_size, plan.is_uniform) == ((None,), 320, True)
    assert (plan.groups, plan.places) == ((0,) * 5, (0, 1, 2, 3, 4))
    none = CachePlan.of([(None, 0, 0)] * 2)
    assert (none.windows, none.page_size, none.groups) == ((None,), 0, (0, 0))


def test_windowed_layers_are_cut_into_groups_as_large_as_the_full_ones() -> None:
    """Gemma 3 12B: 8 layers without a window, 40 with one."""
    plan = CachePlan.of(interleaved(48, 6))
    assert plan.windows == (None, *[512] * 5) and plan.page_size == 8 * 64
    assert plan.groups[:7] == (1, 1, 1, 1, 1, 0, 1) and plan.places[:7] == (0, 1, 2, 3, 4, 0, 5)
    assert plan.groups[-2:] == (5, 0) and plan.places[-2:] == (7, 7)
    assert CachePlan.of(interleaved(24, 2)).windows == (None, 512), "gpt-oss"


def test_a_page_may_stay_empty_in_part() -> None:
    """Gemma 3 1B has 4 and 22 layers: groups of 4, rather than 13 of 2; a part of a page for a group less."""
    plan = CachePlan.of(interleaved(26, 6))
    assert len(plan.windows) == 7 and plan.page_size == 4 * 64
    assert max(place for place, group in zip(plan.places, plan.groups, strict=True) if group == 6) == 1


def test_layers_with_other_heads_have_other_slots() -> None:
    """Gemma 4 31B: full layers have half the elements, in heads of twice the size; a state has no cache."""
    windowed, full = (1024, 8192, 256), (None, 4096, 512)
    plan = CachePlan.of([*[windowed, windowed, (None, 0, 0), windowed, windowed, windowed, full] * 10])
    assert plan.page_size == 40_960 and plan.windows == (None, *[1024] * 10) and not plan.is_uniform
    assert plan.slots == (4096, *[8192] * 10) and plan.groups[:7] == (1, 1, 0, 1, 1, 1, 0)


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 4, 9]), st.sampled_from([0, 32, 48, 64]), st.sampled_from([8, 16])),
        min_size=1,
        max_size=40,
    )
)
def test_no_two_layers_of_a_group_overlap(layers: Layers) -> None:
    plan = CachePlan.of(layers)
    cached = [index for index, (_, size, _) in enumerate(layers) if size]
    spans = [(plan.groups[i], plan.places[i] * plan.slots[plan.groups[i]], layers[i][1]) for i in cached]
    for group, start, size in spans:
        assert start + size <= plan.page_size and size <= plan.slots[group]
    assert len({(group, start) for group, start, _ in spans}) == len(spans)
    assert all(plan.windows[plan.groups[i]] == layers[i][0] for i in cached)
    assert sorted({plan.groups[i] for i in cached}) == list(range(len(plan.windows) if cached else 0))
    assert list(plan.windows) == sorted(plan.windows, key=lambda window: -(window or 10**9))
    assert all(plan.page_size % dim == 0 for _, size, dim in layers if size)
