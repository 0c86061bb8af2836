"""Which engine a prompt goes to: where most of it is cached, unless that one is much busier."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from microvllm.runtime.process.routing import (
    CACHED_WEIGHT,
    MAX_MORE_OPEN,
    OPEN_TOKENS,
    PrefixIndex,
    Router,
    prompt_keys,
)

CHUNK = 32
PROMPT = list(range(1000, 1000 + 10 * CHUNK))


@dataclass
class Engine:
    """What a router knows of an engine."""

    num_open: int = 0
    waiting_tokens: int = 0
    predicted_wait: float = 0.0
    prefixes: PrefixIndex = field(default_factory=lambda: PrefixIndex(CHUNK))

    def note(self, prompt: list[int], capacity: int = 1 << 20) -> None:
        self.prefixes.note(keys_of(prompt), capacity)


def keys_of(prompt: list[int], salt: str = "") -> list[int]:
    return prompt_keys(prompt, CHUNK, salt)


def chosen(engines: list[Engine], prompt: list[int] = PROMPT, rows: int = 256, wait_s: float = 9.0) -> int:
    """The engine that is chosen, whatever the turn; fails if that depends on the turn."""
    router = Router(rows, wait_s)
    found = {id(router.choose(engines, keys_of(prompt))) for _ in engines}
    assert len(found) == 1, "equals were given turns"
    return [id(engine) for engine in engines].index(found.pop())


def test_a_key_is_that_of_all_tokens_before_it() -> None:
    keys = keys_of(PROMPT + [1] * (CHUNK - 1))
    assert len(keys) == 10, "the last chunk is not whole"
    other = keys_of([*PROMPT[: 3 * CHUNK], 7, *PROMPT[3 * CHUNK + 1 :]])
    assert keys[:3] == other[:3] and not set(keys[3:]) & set(other)
    assert not set(keys) & set(keys_of(PROMPT, salt="another tenant"))
    assert keys_of([]) == keys_of([5] * (CHUNK - 1)) == []


def test_the_longest_cached_part_decides_between_equals() -> None:
    none, short, long = Engine(), Engine(), Engine()
    short.note(PROMPT[: 4 * CHUNK])
    long.note(PROMPT[: 6 * CHUNK])
    assert short.prefixes.matched(keys_of(PROMPT)) == 4 * CHUNK
    assert chosen([none, short, long]) == 2 and chosen([long, none, short]) == 0


def test_a_much_busier_engine_is_not_chosen() -> None:
    holder, idle = Engine(num_open=MAX_MORE_OPEN), Engine()
    holder.note(PROMPT)
    assert CACHED_WEIGHT * len(PROMPT) > MAX_MORE_OPEN * OPEN_TOKENS and chosen([holder, idle]) == 0
    holder.num_open += 1
    assert chosen([holder, idle]) == 1
    idle.num_open = 1
    assert chosen([holder, idle]) == 0
    holder.num_open, holder.waiting_tokens = 0, CACHED_WEIGHT * len(PROMPT) + 2 * OPEN_TOKENS
    assert chosen([holder, idle]) == 1
    holder.note(PROMPT[: 2 * CHUNK])
    assert chosen([holder, idle], PROMPT[: 2 * CHUNK]) == 1


def test_of_a_short_cached_part_open_sequences_outweigh() -> None:
    holder, idle = Engine(num_open=5), Engine()
    holder.note(PROMPT[:CHUNK])
    assert CACHED_WEIGHT * CHUNK < 5 * OPEN_TOKENS and chosen([holder, idle], PROMPT[:CHUNK]) == 1


def test_a_free_row_comes_before_a_cached_prefix() -> None:
    full, free = Engine(num_open=8), Engine(num_open=7, waiting_tokens=5000)
    full.note(PROMPT)
    assert chosen([full, free], rows=8) == 1


def test_an_engine_that_would_begin_too_late_is_left_out() -> None:
    late, early = Engine(num_open=8, predicted_wait=3.0), Engine(num_open=30, predicted_wait=0.5)
    late.note(PROMPT)
    assert chosen([late, early], rows=8, wait_s=1.0) == 1
    assert chosen([late, early], rows=8, wait_s=5.0) == 0
    assert chosen([late, early], rows=8, wait_s=0.1) == 0, "where all are late, the rule stays"


def test_equals_have_turns() -> None:
    router, engines = Router(256, 9.0), [Engine(), Engine(), Engine()]
    by_id = {id(engine): number for number, engine in enumerate(engines)}
    found = [by_id[id(router.choose(engines, keys_of(PROMPT)))] for _ in range(6)]
    assert sorted(found) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("capacity", [0, 5 * CHUNK, 6 * CHUNK])
def test_what_the_cache_cannot_hold_is_forgotten_from_the_end(capacity: int) -> None:
    engine = Engine()
    engine.note(PROMPT, capacity)
    assert engine.prefixes.matched(keys_of(PROMPT)) == capacity


def test_the_prompts_that_were_used_last_stay() -> None:
    engine, other = Engine(), [7] * 5 * CHUNK
    engine.note(PROMPT)
    engine.note(other)
    engine.note(PROMPT, 10 * CHUNK)
    assert engine.prefixes.matched(keys_of(PROMPT)) == 10 * CHUNK
    assert engine.prefixes.matched(keys_of(other)) == 0
    engine.prefixes.clear()
    assert engine.prefixes.matched(keys_of(PROMPT)) == 0
