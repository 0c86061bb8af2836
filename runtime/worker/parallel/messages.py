"""What rank 0 sends to the other ranks and what they answer: msgpack over a socket pair for each.

A plan is sent as what has changed. `PlanWriter` makes the messages and `PlanReader` the plans of them, whose
requests are the same as those of rank 0: from the same state each rank then takes the same decisions.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import Request, ScheduledRequest, StepPlan
from microvllm.runtime.core.prefix_keys import PrefixKeys
from microvllm.runtime.request import EngineRequest


class StartRank(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """First message to a rank. `folder`: where the ranks find each other."""

    config: EngineConfig
    rank: int
    folder: str


class AdmittedRow(msgspec.Struct, frozen=True, array_like=True):
    """A request that has a row from now on; `source` is without its prompt, `token_ids` begin with it."""

    row: int
    source: EngineRequest
    token_ids: list[int]
    prompt_len: int


class ScheduledRow(msgspec.Struct, frozen=True, array_like=True):
    """An entry of `StepPlan.scheduled`. `tokens`: those that became known since the row's last entry."""

    row: int
    start: int
    num_new: int
    samples: bool
    first_block: int
    new_blocks: tuple[int, ...]
    tokens: list[int]
    num_prompt_logprobs: int = 0


class PlanMessage(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    """One step."""

    released_rows: tuple[int, ...]
    admitted: list[AdmittedRow]
    scheduled: list[ScheduledRow]
    restored: tuple[tuple[int, int], ...] = ()
    kept: tuple[tuple[int, int], ...] = ()


class RankHello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The answer to `StartRank`: the rank is about to join the others. `stamp`: see `stamp_of`."""

    stamp: str


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The rank has loaded its part of the model."""


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The rank ends: the reason in one line, and the remedy in another if it is known."""

    message: str
    remedy: str | None = None


class RankBeat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Sent about each second. `steps`: how many messages the rank has read and done."""

    steps: int


def stamp_of(config: EngineConfig) -> str:
    """What is the same for all ranks: code, versions, names, sizes and times of the model's files."""
    model = Path(config.model_path)
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    digest = hashlib.sha256(msgspec.msgpack.encode(config))
    for status, file in ((file.stat(), file) for file in files):
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    python = ".".join(map(str, sys.version_info[:3]))
    code = Path(__file__).resolve().parents[3]
    return f"code in {code}, torch {version('torch')}, Python {python}, checkpoint {digest.hexdigest()[:16]}"


ToRank = StartRank | PlanMessage
FromRank = RankHello | RankReady | RankFailed | RankBeat


class PlanWriter:
    """Turns the plans of rank 0 into messages; notes how many tokens of each row were sent."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}

    def message(self, plan: StepPlan) -> PlanMessage:
        """To be called for every plan, in order, before it is launched."""
        admitted = []
        for request in plan.admitted:
            source = msgspec.structs.replace(request.source, prompt_token_ids=[])
            admitted.append(AdmittedRow(request.row, source, request.token_ids, request.prompt_len))
            self._sent[request.row] = len(request.token_ids)
        scheduled = [self._entry(item) for item in plan.scheduled]
        return PlanMessage(plan.released_rows, admitted, scheduled, plan.restored, plan.kept)

    def _entry(self, item: ScheduledRequest) -> ScheduledRow:
        request, row = item.request, item.request.row
        known = len(request.token_ids)
        tokens = request.token_ids[self._sent[row] :] if known > self._sent[row] else []
        self._sent[row] = known
        return ScheduledRow(
            row,
            item.start,
            item.num_new,
            item.samples,
            item.first_block,
            item.new_blocks,
            tokens,
            request.num_prompt_logprobs,
        )


class PlanReader:
    """Turns the messages back into plans, of requests of its own: one for each row."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}

    def plan(self, message: PlanMessage) -> StepPlan:
        admitted = []
        for each in message.admitted:
            request = Request(each.source, (0, 0), PrefixKeys(each.token_ids, 1, b""), frozenset())
            request.row, request.prompt_len = each.row, each.prompt_len
            self._requests[each.row] = request
            admitted.append(request)
        scheduled = tuple(self._item(entry) for entry in message.scheduled)
        return StepPlan(message.released_rows, tuple(admitted), scheduled, message.restored, message.kept)

    def _item(self, entry: ScheduledRow) -> ScheduledRequest:
        request = self._requests[entry.row]
        request.token_ids += entry.tokens
        request.num_prompt_logprobs = entry.num_prompt_logprobs
        return ScheduledRequest(
            request, entry.start, entry.num_new, entry.samples, entry.first_block, entry.new_blocks
        )
