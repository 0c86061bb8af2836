"""Decides which jobs run where on a machine with GPUs; starts nothing, and has the time from its caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import yaml


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of bash, and what it needs.

    seconds: that it is expected to take. gpus: how many; share: the part that it takes of each, 1 for what
    is measured. cores: that no other job has. limit: seconds after which it is interrupted; by default twice
    what is expected and a minute. outlives: runs on when the command that started it ends. show: a regular
    expression of the lines of its output that matter.
    """

    name: str
    command: str
    seconds: int
    gpus: int | Literal["all"] = 0
    share: float = 1.0
    cores: int = 2
    limit: int | None = None
    outlives: bool = False
    show: str = ""

    @property
    def limit_s(self) -> int:
        return 2 * self.seconds + 60 if self.limit is None else self.limit


class JobsError(Exception):
    """What is wrong with a file of jobs, in one line."""


def read_jobs(path: Path) -> list[Job]:
    """Return the jobs of a file, in its order. Raises `JobsError`."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text("utf-8")), list[Job])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise JobsError(f"{path}: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Place:
    """What a job has: the numbers of its GPUs, its share of each, and its processor cores."""

    gpus: tuple[int, ...]
    share: float
    cores: tuple[int, ...]


@dataclass
class Pool:
    """Gives jobs their places, in the order of the list.

    A job that has to wait claims the GPUs that are expected to be free first, and cores: what comes behind
    it gets only what is left. No job begins that is not expected to end by `until`, unless it outlives that.
    """

    waiting: list[Job]
    num_gpus: int
    cores: Sequence[int]
    until: float
    running: dict[Job, tuple[Place, float]] = field(default_factory=dict)  # with the time of its start

    def begin(self, now: float) -> list[tuple[Job, Place]]:
        """Return the jobs that begin now; they count as running."""
        taken = {core for place, _ in self.running.values() for core in place.cores}
        cores = [core for core in self.cores if core not in taken]
        unclaimed, begun = list(range(self.num_gpus)), []
        for job in list(self.waiting):
            count = max(1, self.num_gpus) if job.gpus == "all" else job.gpus
            too_late = now + job.seconds > self.until and not job.outlives
            if too_late or count > len(unclaimed):
                continue
            wanted = min(job.cores, len(self.cores))
            # The fullest ones, so that others stay whole.
            free = sorted((left, gpu) for gpu in unclaimed if (left := self._left(gpu)) > job.share - 1e-6)
            if len(free) >= count and len(cores) >= wanted:
                place = Place(tuple(gpu for _, gpu in free[:count]), job.share, tuple(cores[:wanted]))
                self.waiting.remove(job)
                self.running[job] = place, now
                begun.append((job, place))
            else:
                for _, gpu in sorted((self._end(gpu), gpu) for gpu in unclaimed)[:count]:
                    unclaimed.remove(gpu)
            del cores[:wanted]
        return begun

    def end(self, job: Job) -> None:
        del self.running[job]

    def _left(self, gpu: int) -> float:
        return 1 - sum(place.share for place, _ in self.running.values() if gpu in place.gpus)

    def _end(self, gpu: int) -> float:
        ends = (start + job.seconds for job, (place, start) in self.running.items() if gpu in place.gpus)
        return max(ends, default=0.0)


def plan(jobs: Sequence[Job], num_gpus: int, cores: int, limit: float, calls: int) -> list[str]:
    """A line for each job, were each to take what is expected: when it begins, and where."""
    pool, now, lines = Pool(list(jobs), num_gpus, range(cores), 0.0), 0.0, []
    for call in range(calls):
        began, pool.until = now, now + limit
        busy = 0.0
        lines.append(f"call {call + 1}")
        while True:
            for job, place in pool.begin(now):
                gpus = ",".join(map(str, place.gpus)) or "-"
                span = f"{now - began:5.0f} to {now - began + job.seconds:5.0f} s"
                lines.append(f"  {span}  GPU {gpus:5} {len(place.cores):2} cores  {job.name}")
                busy += job.seconds * place.share * len(place.gpus)
            ends = {start + job.seconds: job for job, (_, start) in pool.running.items()}
            if not ends or min(ends) > pool.until:
                break
            now = min(ends)
            pool.end(ends[now])
        now = pool.until if any(job.outlives for job in pool.running) else now
        lines.append(
            f"  {now - began:.0f} s, {busy:.0f} of {num_gpus * limit:.0f} seconds of GPUs are planned"
        )
    lines += [f"  left out: {job.name}" for job in pool.waiting]
    return lines
