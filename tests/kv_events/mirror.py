"""What a router knows of an engine's prefix cache from its events alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec


class Block(NamedTuple):
    """A cached block: the hash of the one before it, its tokens, and the extra key of its hash."""

    parent: Any
    tokens: tuple[int, ...]
    extra: tuple[str, ...] | None


class Mirror:
    """Follows events; raises `AssertionError` for those that contradict what came before."""

    def __init__(self, windows: Sequence[int | None] = (None,)) -> None:
        self.groups: list[dict[Any, Block]] = [{} for _ in windows]
        self._windows = windows

    @property
    def blocks(self) -> dict[Any, Block]:
        """Those of the first group."""
        return self.groups[0]

    def apply(self, events: Iterable[Any]) -> None:
        """Follow decoded msgpack: a map each, as vLLM 0.33 sends it."""
        for event in events:
            if event["type"] == "BlockStored":
                self._store(event)
            elif event["type"] == "BlockRemoved":
                self._remove(event)
            else:
                assert event == {"type": "AllBlocksCleared"}
                for group in self.groups:
                    group.clear()

    def apply_structs(self, events: Iterable[Any]) -> None:
        self.apply(msgspec.msgpack.decode(msgspec.msgpack.encode(list(events))))

    def _remove(self, event: dict[str, Any]) -> None:
        assert event.keys() == {"type", "block_hashes", "medium", "group_idx"}
        assert event["medium"] == "GPU" and event["block_hashes"]
        for number in event["block_hashes"]:
            del self.groups[event["group_idx"]][number]

    def _store(self, event: dict[str, Any]) -> None:
        assert event["medium"] == "GPU" and event["lora_id"] is event["lora_name"] is None
        blocks, window = self.groups[event["group_idx"]], self._windows[event["group_idx"]]
        assert event["kv_cache_spec_kind"] == ("full_attention" if window is None else "sliding_window")
        assert event.get("kv_cache_spec_sliding_window") == window
        size, hashes, tokens = event["block_size"], event["block_hashes"], event["token_ids"]
        assert hashes and len(tokens) == size * len(hashes) and len(event["extra_keys"]) == len(hashes)
        parent = event["parent_block_hash"]
        for index, (number, extra) in enumerate(zip(hashes, event["extra_keys"], strict=True)):
            assert number not in blocks, "stored twice"
            own = tuple(tokens[index * size : (index + 1) * size])
            blocks[number] = Block(parent, own, None if extra is None else tuple(extra))
            parent = number
