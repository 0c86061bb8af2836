"""A mirror built from the events alone equals the prefix cache, whatever the engine does."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import VOCAB, Engine, FakeDrafter, FakeStep, make_request
from mirror import Block, Mirror

from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent
from microvllm.runtime.kv_events.publishing_core import INT_HASHES, PublishingCore

MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "drafts": {"drafter": FakeDrafter()},
    "windows": {"windows": (None, 8, 12), "async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 5, "max_num_seqs": 4, "async_scheduling": True},
}


class Collected:
    """A publisher that keeps the events of each step."""

    config = KVEventsConfig()

    def __init__(self) -> None:
        self.batches: list[list[KVEvent]] = []
        self.closed = False

    def publish(self, events: list[KVEvent]) -> None:
        if events:
            self.batches.append(events)

    def close(self) -> None:
        self.closed = True


class Observed(Engine):
    """The engine on the fake runner, with a mirror of its cache."""

    core: PublishingCore[FakeStep]  # type: ignore[assignment]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.published = Collected()
        self.core = PublishingCore(self.config, self.runner, self.published, options.get("drafter"))
        self.mirror = Mirror(self.config.spec.cache_plan.windows)
        self.kinds: set[type] = set()

    def compare(self) -> None:
        """The mirror has the keys of the cache, and the tokens that lie in its blocks."""
        for events in self.published.batches:
            self.kinds.update(map(type, events))
            self.mirror.apply_structs(events)
        self.published.batches.clear()
        for group, blocks in enumerate(self.mirror.groups):
            self._compare(group, blocks)

    def _compare(self, group: int, blocks: dict[Any, Block]) -> None:
        cached = self.core.kv.groups[group].block_of
        index = {int.from_bytes(key[-8:], "big"): block for key, block in cached.items()}
        assert blocks.keys() == index.keys()
        for number, block in index.items():
            cells = [cell for cell in self.runner.block_content(block) if cell is not None]
            known = blocks[number]
            assert known.tokens == tuple(cell.token for cell in cells)
            assert (known.parent is None) == (cells[0].position == 0)
            salt = (cells[0].salt,) if cells[0].salt and known.parent is None else None
            assert known.extra == salt
            if known.parent in index:
                before = self.runner.block_content(index[known.parent])
                assert before[-1] is not None and before[-1].position + 1 == cells[0].position


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_a_mirror_equals_the_cache_after_every_step(mode: str, seed: int) -> None:
    rng = random.Random(seed)
    groups = len(MODES[mode].get("windows", (None,)))
    engine = Observed(num_blocks=groups * rng.choice([16, 20, 40]), **MODES[mode])
    stems = [[rng.randrange(VOCAB) for _ in range(rng.randrange(4, 30))] for _ in range(3)]
    number = 0
    for _ in range(300):
        if rng.random() < 0.3:
            stem = rng.choice(stems)
            prompt = stem[: rng.randrange(len(stem)) + 1] + [rng.randrange(VOCAB) for _ in range(3)]
            salt = rng.choice(["", "", "tenant"])
            engine.add(make_request(number, prompt, rng.randrange(1, 24), eos=None, salt=salt))
            number += 1
        if rng.random() < 0.05:
            engine.core.abort(rng.randrange(number + 1))
        if rng.random() < 0.02:
            engine.core.reset_prefix_cache()
            engine.compare()
            assert not any(engine.mirror.groups)
        engine.step()
        engine.compare()
    engine.drain()
    engine.compare()
    assert engine.kinds == {BlockStored, BlockRemoved, AllBlocksCleared} and all(engine.mirror.groups)
    assert engine.core.stats().prefix_hits


def test_a_prompt_is_one_event_and_its_continuation_names_its_parent() -> None:
    engine = Observed()
    assert engine.published.batches == [[AllBlocksCleared()]]  # an engine before it may have stored more
    engine.published.batches.clear()
    engine.run(make_request(0, range(3, 13), 8, eos=None))
    (first,), *rest = engine.published.batches
    assert (
        isinstance(first, BlockStored) and first.parent_block_hash is None and first.extra_keys == [None] * 2
    )
    assert first.token_ids == list(range(3, 11)) and first.block_size == 4
    parents = [first.block_hashes[-1]]
    for (event,) in rest:
        assert isinstance(event, BlockStored) and [event.parent_block_hash] == parents
        parents = event.block_hashes
    assert len(rest) == 2


def test_a_salt_is_the_extra_key_of_the_first_block() -> None:
    engine = Observed()
    engine.run(make_request(0, range(3, 13), 1, salt="tenant"))
    (event,) = engine.published.batches[-1]
    assert isinstance(event, BlockStored) and event.extra_keys == [("tenant",), None]


def test_hashes_may_be_whole_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INT_HASHES, "0")
    engine = Observed()
    engine.run(make_request(0, range(3, 13), 1))
    (event,) = engine.published.batches[-1]
    assert (
        isinstance(event, BlockStored) and set(event.block_hashes) == engine.core.kv.groups[0].block_of.keys()
    )


def test_the_publisher_is_closed_with_the_core() -> None:
    engine = Observed()
    published = engine.published
    del engine.core
    assert published.closed
