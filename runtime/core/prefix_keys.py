"""Computes the keys under which the prefix cache finds blocks. Imports no torch."""

from __future__ import annotations

import hashlib
from array import array


class PrefixKeys:
    """The chain of prefix-cache keys of one growing token list, computed once a block.

    key[i] = SHA-256(key[i-1] ‖ token ids of block i); the chain starts from a secret root and the
    request's salt, so that nobody can construct a collision or probe another tenant's prefixes
    (CVE-2025-25183, CVE-2025-46570).
    """

    __slots__ = ("_block_size", "_keys", "token_ids")

    def __init__(self, token_ids: list[int], block_size: int, root: bytes) -> None:
        self.token_ids = token_ids  # shared with the request and growing with it
        self._block_size = block_size
        self._keys: list[bytes] = [root]

    def fork(self, token_ids: list[int]) -> PrefixKeys:
        """The keys of a list that begins with all tokens of this one and grows by itself."""
        forked = PrefixKeys(token_ids, self._block_size, self._keys[0])
        forked._keys = self._keys.copy()
        return forked

    def upto(self, num_blocks: int) -> list[bytes]:
        """Keys of the first `num_blocks` blocks, all of whose tokens are known."""
        keys, size = self._keys, self._block_size
        while len(keys) <= num_blocks:
            start = (len(keys) - 1) * size
            tokens = array("q", self.token_ids[start : start + size])
            keys.append(hashlib.sha256(keys[-1] + tokens.tobytes()).digest())
        return keys[1 : num_blocks + 1]
