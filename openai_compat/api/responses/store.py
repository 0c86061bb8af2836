"""Keeps responses in memory, to be continued and to be read again; the least recently used go first."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec
import orjson

from microvllm.openai_compat.errors import BodyMemoryError, clip
from microvllm.runtime.errors import InvalidRequestError, RequestError

ID_PREFIX = "resp_"
MAX_RESPONSES = 16384
# Of Python's own for each response, beside its bytes.
OVERHEAD_BYTES = 1024
UNFINISHED = ("queued", "in_progress")
_ITEM_ID = re.compile(r"[a-z]{2,4}_([A-Za-z0-9._-]{1,128})_\d{1,6}", re.ASCII)


def item_id(kind: str, suffix: str, index: int) -> str:
    """Return the id of output item `index` of the response whose id ends in `suffix`."""
    return f"{kind}_{suffix}_{index}"


class ResponseNotFoundError(RequestError):
    """A path names a response that is not, or no longer, stored."""

    status = 404
    kind = "NotFoundError"


class _Parts(msgspec.Struct):
    """What is read of a stored response; the rest of it is skipped, not created."""

    id: str
    status: str
    output: msgspec.Raw


class _Item(msgspec.Struct):
    """What is read of an output item until it is named."""

    id: str


_read_parts = msgspec.json.Decoder(_Parts).decode
_split_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_read_item = msgspec.json.Decoder(_Item).decode


class StoredResponse(NamedTuple):
    """A response and the input items of its request, as JSON; `parent` is the id of the one before it."""

    response: bytes
    input: bytes
    parent: str | None

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.input) + OVERHEAD_BYTES


class ResponseStore:
    """Holds at most `max_bytes` of responses, 0 for none, and at most `MAX_RESPONSES`. Threads may share it.

    A request that names stored turns or items gets at most `max_request_bytes` of them, as much as it could
    have sent itself: otherwise a few bytes would stand for the whole store, or a large item many times.

    A conversation is a chain: each response holds its own turn and names the one before. Using a response
    also marks those before it as used, later than itself, so that eviction shortens a chain from its end.
    """

    def __init__(self, max_bytes: int, max_request_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_request_bytes = max_request_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._held = 0  # bytes of input of responses that are not finished

    def hold(self, num_bytes: int) -> None:
        """Count what an unfinished response will store, until `release`; up to `max_bytes` of all together.

        Members of items that are not read make an input as large as a body. Raises `BodyMemoryError`.
        """
        with self._lock:
            if self._held and self._held + num_bytes > self.max_bytes:
                raise BodyMemoryError
            self._held += num_bytes

    def release(self, num_bytes: int) -> None:
        """Take back what `hold` has counted."""
        with self._lock:
            self._held -= num_bytes

    def __len__(self) -> int:
        return len(self._responses)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def put(self, response_id: str, stored: StoredResponse) -> None:
        """Add or replace a response; one that is larger than the whole store is not kept."""
        with self._lock:
            self._drop(response_id)
            if stored.num_bytes > self.max_bytes:
                return
            self._responses[response_id] = stored
            self.num_bytes += stored.num_bytes
            self._touch(response_id)
            while self.num_bytes > self.max_bytes or len(self._responses) > MAX_RESPONSES:
                self._drop(next(iter(self._responses)))

    def get(self, response_id: str) -> StoredResponse:
        """Return a response. Raises `ResponseNotFoundError`."""
        with self._lock:
            stored = self._responses.get(response_id)
            if stored is None:
                raise ResponseNotFoundError(f"Response {clip(response_id)!r} was not found.", "response_id")
            self._touch(response_id)
            return stored

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises `ResponseNotFoundError`."""
        self.get(response_id)
        with self._lock:
            self._drop(response_id)

    def conversation(self, response_id: str) -> list[Any]:
        """Return the items of a conversation up to and with this response.

        Raises `InvalidRequestError` naming `previous_response_id` if one of its responses is not stored, or
        they are too large together.
        """
        with self._lock:
            chain = self._chain(response_id)
            self._touch(response_id)
        if chain is None:
            problem = f"previous_response_id: {clip(response_id)!r}, or one before it, is not stored."
            raise InvalidRequestError(problem, "previous_response_id")
        turns: list[bytes | msgspec.Raw] = []
        for stored in reversed(chain):
            response = _read_parts(stored.response)
            if response.status in UNFINISHED:
                problem = f"previous_response_id: {response.id!r} is still {response.status}."
                raise InvalidRequestError(problem, "previous_response_id")
            turns += (stored.input, response.output)
        if sum(memoryview(turn).nbytes for turn in turns) > self.max_request_bytes:
            problem = (
                f"previous_response_id: the conversation takes more than {self.max_request_bytes} bytes."
            )
            raise InvalidRequestError(problem, "previous_response_id")
        return [item for turn in turns for item in orjson.loads(memoryview(turn))]

    def output_of(self, response_id: str) -> dict[str, msgspec.Raw]:
        """Return the output items of a response by id, as JSON that is not copied; none of one not stored."""
        with self._lock:
            stored = self._responses.get(response_id)
        items = [] if stored is None else _split_items(_read_parts(stored.response).output)
        return {_read_item(item).id: item for item in items}

    def _chain(self, response_id: str | None) -> list[StoredResponse] | None:
        """Return the response and those before it, the first one last; None if one is missing."""
        chain: list[StoredResponse] = []
        while response_id is not None:
            stored = self._responses.get(response_id)
            if stored is None:
                return None
            chain.append(stored)
            response_id = stored.parent
        return chain

    def _touch(self, response_id: str | None) -> None:
        while response_id is not None and response_id in self._responses:
            self._responses.move_to_end(response_id)
            response_id = self._responses[response_id].parent

    def _drop(self, response_id: str) -> None:
        stored = self._responses.pop(response_id, None)
        if stored is not None:
            self.num_bytes -= stored.num_bytes


class References:
    """Finds the output items that one request names. Each response is read once, and of it what is named."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._left = store.max_request_bytes
        self._found: dict[str, dict[str, msgspec.Raw]] = {}  # by response: its items
        self._read: dict[str, tuple[Any, int]] = {}  # by id: an item that was named, and its size

    def find(self, name: str) -> Any:
        """Return the item with this id, None if its response is not stored.

        Raises `InvalidRequestError` naming `input` if the items found so far are too large together.
        """
        if name not in self._read:
            match = _ITEM_ID.fullmatch(name)
            if match is None:
                return None
            items = self._found.get(match[1])
            if items is None:
                items = self._found[match[1]] = self._store.output_of(ID_PREFIX + match[1])
            if (raw := items.get(name)) is None:
                return None
            self._read[name] = orjson.loads(memoryview(raw)), memoryview(raw).nbytes
        item, size = self._read[name]
        self._left -= size
        if self._left < 0:
            limit = self._store.max_request_bytes
            raise InvalidRequestError(
                f"input: the items that it names take more than {limit} bytes.", "input"
            )
        return item
