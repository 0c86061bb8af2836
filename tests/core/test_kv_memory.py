"""How many blocks the KV cache gets, and which texts they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_memory import CacheLayout, fit_length, size_cache

MIB = 1 << 20
# Six groups of eight layers, five of them with a window, as in Gemma 3 12B.
GEMMA3 = CacheLayout((None, *[1024] * 5), 4 * MIB, 64, 16384)


def layout(*windows: int | None, block_size: int = 16) -> CacheLayout:
    return CacheLayout(windows, 1000, block_size, 64)


def test_one_group_gets_all() -> None:
    one = layout(None)
    assert fit_length(one, 100, 1600, "--x", False) == 1600
    assert fit_length(one, 99, 1600, "--x", True) == 1584
    with pytest.raises(
        ConfigError, match=r"room for 1584 tokens \(99 blocks.* 1600 tokens needs 100 blocks"
    ) as raised:
        fit_length(one, 99, 1600, "--x", False)
    assert raised.value.remedy == "lower --max-model-len or raise --x"
    assert one.room(100, 1600) == one.room(100, 1599) == "1,600 tokens"


def test_a_window_alone_holds_texts_of_any_length() -> None:
    """31 tokens that the first of a step sees, the step's 64, and one block."""
    window = layout(32)
    assert window.groups(10**6) == [(32, 2 + 4 + 1)]
    assert fit_length(window, 7, 10**6, "--x", False) == 10**6
    with pytest.raises(ConfigError, match=r"room for 96 tokens .* needs 7 blocks"):
        fit_length(window, 6, 10**6, "--x", False)
    assert fit_length(window, 6, 10**6, "--x", True) == 96


def test_tokens_that_fit_rise_with_the_length() -> None:
    """Of 100 GiB; a block of all groups takes 24 MiB, so 4,266 blocks of 64 tokens fit without windows."""
    blocks = (100 << 30) // GEMMA3.page_bytes
    assert GEMMA3.tokens(blocks, 1024) == 4266 * 64 + 42, "as if there were no windows"
    requests = [GEMMA3.tokens(blocks, length) // length for length in (1024, 4096, 32_768)]
    assert requests == [266, 171, 42]
    assert GEMMA3.room(blocks, 131_072) == (
        "273,066 tokens in texts of 1,024 and 1,573,109 tokens in texts of 131,072"
    )
    assert GEMMA3.room(blocks, 1024) == "273,066 tokens"


def test_little_memory_shortens_the_context() -> None:
    needed = GEMMA3.blocks_for(131_072)
    assert needed == 2048 + 5 * (16 + 256 + 1)
    assert fit_length(GEMMA3, needed, 131_072, "--x", False) == 131_072
    assert fit_length(GEMMA3, needed - 1, 131_072, "--x", True) == 131_072 - 64
    with pytest.raises(ConfigError, match=r"\(3412 blocks, 13648 MiB\).*needs 3413 blocks \(13652 MiB\)"):
        fit_length(GEMMA3, needed - 1, 131_072, "--x", False)


@given(
    st.lists(st.none() | st.integers(1, 300), min_size=1, max_size=6),
    st.integers(1, 2000),
    st.integers(0, 2000),
    st.integers(1, 40),
)
def test_a_text_of_full_length_always_finds_room(
    windows: list[int | None], length: int, blocks: int, block_size: int
) -> None:
    found = layout(*windows, block_size=block_size)
    try:
        fitted = fit_length(found, blocks, length, "--x", True)
    except ConfigError:
        assert found.blocks_for(min(length, block_size)) > blocks
        return
    assert 0 < fitted <= length and found.blocks_for(fitted) <= blocks
    assert (
        -(-fitted // block_size) == -(-length // block_size) or found.blocks_for(fitted + block_size) > blocks
    )
    # Once a text is computed it holds no more than while it is, and there is room for it.
    assert found.tokens(blocks, fitted) >= fitted


def test_a_cache_that_does_not_fit_a_cpu_s_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.runtime.kv_memory.available_memory", lambda: 8 << 30)
    with pytest.raises(ConfigError, match=r"a KV cache of 3000 blocks takes 11\.7 GiB, and 8\.0 GiB"):
        size_cache("cpu", GEMMA3, 4096, blocks=3000)
    blocks, length = size_cache("cpu", GEMMA3, 1024)
    assert length == 1024 and blocks == GEMMA3.blocks_for(1024) and blocks * 4 * MIB <= 0.4 * (8 << 30)
    assert size_cache("cuda", GEMMA3, 4096) == (0, 4096)
    assert size_cache("cuda", GEMMA3, 4096, cache_bytes=10 << 30) == (2560, 4096)
