"""How memory is divided among the pools of several windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_memory import CacheLayout, fit_pools, size_pools

MIB = 1 << 20
# Five of six layers with a window, as in Gemma 3.
GEMMA3 = CacheLayout((None, 1024), (MIB, 5 * MIB), 64, 16384, 256)


def layout(windows: tuple[int | None, ...], sizes: tuple[int, ...], **fields: int) -> CacheLayout:
    defaults = {"block_size": 16, "step_tokens": 64, "max_num_seqs": 4}
    return CacheLayout(windows, sizes, **{**defaults, **fields})


def test_one_pool_gets_all() -> None:
    one = layout((None,), (1000,))
    assert fit_pools(one, 100_999, 1600, "--x", False) == ((100,), 1600)
    assert fit_pools(one, 99_999, 1600, "--x", True) == ((99,), 1584)
    with pytest.raises(
        ConfigError, match=r"room for 1584 tokens \(99 blocks.* 1600 tokens needs 100 blocks"
    ) as raised:
        fit_pools(one, 99_999, 1600, "--x", False)
    assert raised.value.remedy == "lower --max-model-len or raise --x"


def test_a_window_alone_holds_texts_of_any_length() -> None:
    """31 tokens that the first of a step sees, the step's 64, and one block."""
    window = layout((32,), (1000,))
    assert window.most_held(0, 10**6) == 2 + 4 + 1
    assert fit_pools(window, 7000, 10**6, "--x", False) == ((7,), 10**6)
    with pytest.raises(ConfigError, match=r"room for 96 tokens .* needs 7 blocks"):
        fit_pools(window, 6999, 10**6, "--x", False)
    assert fit_pools(window, 6999, 10**6, "--x", True) == ((6,), 96)


def test_tokens_that_fit_rise_several_times() -> None:
    memory = 100_000 * MIB
    pools, length = fit_pools(GEMMA3, memory, 131_072, "--x", False)
    before = memory // (6 * MIB)
    assert length == 131_072 and GEMMA3.size(pools) <= memory < GEMMA3.size(pools) + MIB
    assert pools[0] > 3 * before and before > pools[1] > before / 2
    assert GEMMA3.room((10, 2)) == "640 tokens and 128 tokens in windows of 1,024"


@pytest.mark.parametrize("length", [512, 1024, 1500, 4096, 32_768, 131_072])
def test_no_length_fares_much_worse_than_in_pools_made_for_it(length: int) -> None:
    """In requests per memory; at both ends, short ones and those of full length, equally."""
    layout, memory = replace(GEMMA3, step_tokens=64, max_num_seqs=10**9), 10**9 * MIB
    pools, _ = fit_pools(layout, memory, length, "--x", False)

    def share(tokens: int) -> float:
        in_window = min(tokens, 1024)
        found = min(pools[0] / tokens, pools[1] / in_window)
        return found / (memory / (tokens + 5 * in_window) / MIB)

    shares = [share(tokens) for tokens in range(16, length + 1, 16)]
    of_longest = length / (length + 5 * min(length, 1024))
    assert min(shares) == pytest.approx(1 / (5 / 6 + of_longest), rel=0.01)
    assert share(16) == pytest.approx(share(length), rel=0.01)


def test_a_window_gets_no_more_than_it_can_use() -> None:
    memory = 10_000_000 * MIB
    pools, _ = fit_pools(GEMMA3, memory, 131_072, "--x", False)
    # 256 requests, each with 1,023 tokens, two blocks, and all of them with two steps; twice.
    assert pools[1] == 2 * (256 * (16 + 2) + 16384 // 64)
    assert pools[0] * MIB > 0.99 * (memory - pools[1] * 5 * MIB)
    short, _ = fit_pools(GEMMA3, memory, 128, "--x", False)
    assert short[1] == 2 * (256 * 2 + 16384 // 64), "no request holds more than its length"


def test_little_memory_goes_to_one_long_request_first() -> None:
    needed = GEMMA3.bytes_for(131_072)
    pools, length = fit_pools(GEMMA3, needed, 131_072, "--x", False)
    assert (pools, length) == ((2048, 16 + 256 + 1), 131_072)
    pools, length = fit_pools(GEMMA3, needed - 1, 131_072, "--x", True)
    assert length == 131_072 - 64 and pools == (2047, 273)


def test_a_requested_number_of_blocks_is_the_first_pool_s() -> None:
    assert fit_pools(GEMMA3, 0, 131_072, "--x", False, blocks=3000) == ((3000, 3000), 131_072)
    assert fit_pools(GEMMA3, 0, 131_072, "--x", False, blocks=30_000)[0] == (30_000, 9728)
    assert fit_pools(GEMMA3, 0, 131_072, "--x", True, blocks=1000) == ((1000, 1000), 64_000)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 50)), max_size=3),
    st.integers(1, 50),
    st.integers(1, 2000),
    st.integers(0, 100_000),
    st.integers(1, 40),
)
def test_every_division_holds_one_request_and_fits(
    windows: list[tuple[int, int]], size: int, length: int, memory: int, block_size: int
) -> None:
    found = layout((None, *(w for w, _ in windows)), (size, *(s for _, s in windows)), block_size=block_size)
    try:
        pools, fitted = fit_pools(found, memory, length, "--x", True)
    except ConfigError:
        assert found.bytes_for(min(length, block_size)) > memory
        return
    assert found.size(pools) <= memory and 0 < fitted <= length
    assert all(pools[i] >= found.most_held(i, fitted) for i in range(len(pools)))
    assert (
        -(-fitted // block_size) == -(-length // block_size) or found.bytes_for(fitted + block_size) > memory
    )


def test_pools_that_do_not_fit_a_cpu_s_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.runtime.kv_memory.available_memory", lambda: 1 << 30)
    with pytest.raises(ConfigError, match=r"a KV cache of 3000 blocks takes 17\.6 GiB, and 1\.0 GiB"):
        size_pools("cpu", GEMMA3, 4096, blocks=3000)
    pools, length = size_pools("cpu", GEMMA3, 1024)
    assert length == 1024 and GEMMA3.size(pools) <= 0.4 * (1 << 30)
    assert size_pools("cuda", GEMMA3, 4096) == ((0, 0), 4096)
