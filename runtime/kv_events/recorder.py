"""Turns what changes in a prefix cache into events, without a line in the cache itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from microvllm.runtime.core.kv_cache import KVCacheManager
from microvllm.runtime.core.plan import Request, ScheduledRequest
from microvllm.runtime.kv_events.events import (
    MEDIUM,
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    KVEvent,
)

HASH_BYTES = 8
FULL_ATTENTION, WINDOW = "full_attention", "sliding_window"  # vLLM's names of a group of layers


class Change(NamedTuple):
    """A key that came into the index of a group of layers or went; None: all went."""

    group: int
    key: bytes | None
    stored: bool = False


class RecordedIndex(dict[bytes, int]):
    """The cached blocks of a group by key; appends each change of its keys to `changes`."""

    def __init__(self, group: int, changes: list[Change]) -> None:
        super().__init__()
        self._group, self._changes = group, changes

    def __setitem__(self, key: bytes, block: int) -> None:
        super().__setitem__(key, block)
        self._changes.append(Change(self._group, key, stored=True))

    def __delitem__(self, key: bytes) -> None:
        super().__delitem__(key)
        self._changes.append(Change(self._group, key))

    def clear(self) -> None:
        super().clear()
        self._changes.append(Change(self._group, None))


class _Content(NamedTuple):
    """What a stored block holds, and what its key was made of."""

    parent: bytes | None
    token_ids: list[int]
    salt: str  # of a first block only


class CacheRecorder:
    """Records the changes of a cache, from its first block on.

    A hit is as long as all groups have what they need of it. int_hashes: the form of block hashes.
    """

    def __init__(self, kv: KVCacheManager, *, int_hashes: bool = True) -> None:
        self._block_size = kv.block_size
        self._int_hashes = int_hashes
        self._changes: list[Change] = []
        self._contents: dict[bytes, _Content] = {}  # of blocks stored since the last `take_events`
        self._windows = [group.window for group in kv.groups]
        for index, group in enumerate(kv.groups):
            group.block_of = RecordedIndex(index, self._changes)

    def describe(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Note what the blocks hold that the commit of a step has stored; to be called behind it."""
        missing = {change.key for change in self._changes if change.stored} - self._contents.keys()
        for first in (None, 0):  # accepted drafts fill blocks in front of a step's own: then all are searched
            for item in scheduled if missing else ():
                start = item.start // self._block_size if first is None else first
                end = (item.start + item.num_new - item.num_draft_tokens) // self._block_size
                keys = item.request.keys.upto(end) if start < end else []
                for column in range(start, end):
                    if keys[column] in missing:
                        missing.remove(keys[column])
                        self._contents[keys[column]] = self._content(item.request, keys, column)

    def take_events(self) -> list[KVEvent]:
        """Return the events since the last call, in their order; neighbours of one kind are one event."""
        events: list[KVEvent] = []
        last: bytes | None = None  # the key of the last event's last block
        for group, key, stored in self._changes:
            event = events[-1] if events else None
            if key is None:
                if not isinstance(event, AllBlocksCleared):
                    events.append(AllBlocksCleared())
            elif not stored:
                if not isinstance(event, BlockRemoved) or event.group_idx != group:
                    event = BlockRemoved([], MEDIUM, group_idx=group)
                    events.append(event)
                event.block_hashes.append(self._hash(key))
            else:
                content = self._contents[key]
                follows = content.parent is not None and content.parent == last
                if not isinstance(event, BlockStored) or event.group_idx != group or not follows:
                    event = self._stored(group, content.parent)
                    events.append(event)
                event.block_hashes.append(self._hash(key))
                event.token_ids += content.token_ids
                if event.extra_keys is not None:
                    event.extra_keys.append((content.salt,) if content.salt else None)
            last = key
        self._changes.clear()
        self._contents.clear()
        return events

    def _content(self, request: Request, keys: Sequence[bytes], column: int) -> _Content:
        start = column * self._block_size
        token_ids = request.token_ids[start : start + self._block_size]
        if column:
            return _Content(keys[column - 1], token_ids, "")
        return _Content(None, token_ids, request.source.cache_salt)

    def _stored(self, group: int, parent: bytes | None) -> BlockStored:
        return BlockStored(
            block_hashes=[],
            parent_block_hash=None if parent is None else self._hash(parent),
            token_ids=[],
            block_size=self._block_size,
            lora_id=None,
            medium=MEDIUM,
            lora_name=None,
            extra_keys=[],
            group_idx=group,
            kv_cache_spec_kind=FULL_ATTENTION if self._windows[group] is None else WINDOW,
            kv_cache_spec_sliding_window=self._windows[group],
        )

    def _hash(self, key: bytes) -> BlockHash:
        """The form of vLLM: the last 64 bits, most significant byte first, or the whole key."""
        return int.from_bytes(key[-HASH_BYTES:], "big") if self._int_hashes else key
