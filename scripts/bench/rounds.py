"""Runs engines in turns: A B C A B C ..., the same requests for all in a round, new ones in the next."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bench.engines import Engine
from bench.servers import Server, busy_neighbour, interrupts_later, stop_all
from bench.workloads import Case
from microvllm.openai_compat.bench.client import BenchError, Measured, RequestResult

# After its first answer a server gets a moment to come to rest; then it is watched for as long as IDLE_S.
SETTLE_S = 1.0
IDLE_S = 2.0
PREEMPTIONS = r"^vllm:num_preemptions_total(?:\{.*\})? (\S+)$"
TURNS = ("halt", "restart", "sequence")


@dataclass(slots=True)
class Row:
    """What was measured of one engine; `reports` has one entry a round."""

    engine: Engine
    ready_s: list[float] = field(default_factory=list)
    """Of each start."""
    idle_cpu: float = 0.0
    """Share of a core that the server took while it had nothing to do and was not halted."""
    memory: int = 0
    """Resident bytes after the last round."""
    reports: dict[Case, list[Measured]] = field(default_factory=dict)
    trouble: str = ""
    """Why it is missing, or ended early."""
    preemptions: int = 0
    """Requests that its scheduler preempted, warm-up included, as its last server counts them."""

    @property
    def label(self) -> str:
        return f"{self.engine.name} ({self.engine.weights})"

    def requests(self, case: Case) -> list[RequestResult]:
        """All requests of all rounds of a case."""
        return [request for report in self.reports.get(case, ()) for request in report.requests]

    def good(self, case: Case) -> list[RequestResult]:
        """Those without error."""
        return [request for request in self.requests(case) if not request.error]

    def errors(self) -> list[str]:
        """What went wrong in any request, once each."""
        return sorted({e for reports in self.reports.values() for report in reports for e in report.errors})


@dataclass(frozen=True, slots=True)
class Plan:
    """How the engines are compared."""

    cases: Sequence[Case]
    rounds: int
    turns: str = "halt"
    """`halt`: all servers stay up, those whose turn it is not are stopped (SIGSTOP) and take no processor
    time. `restart`: each turn has a fresh server, the only one. `sequence`: one engine after the other."""
    prompts: str = "text"
    seed: int = 0
    warmup_len: int = 16
    """Longest answer of what is sent before the first round, and thrown away."""
    warmup_users: int | None = None
    """Most users of it; None: as many as are measured."""
    start_timeout_s: float = 600.0
    start_share: float = 1.0
    """Of the time that is left, what a server may take to start."""
    timeout_s: float = 600.0
    ends: float = float("inf")
    """Moment (`time.monotonic`) at which all should be over: what would end later does not begin."""


@dataclass(slots=True)
class Comparison:
    """Runs a plan; `rows` has the results, also of a run that was interrupted."""

    plan: Plan
    logs: Path
    say: Callable[[str], None]
    """Log callback: called with each line of progress."""
    advance: Callable[[str], None]
    """Progress callback: called with what begins, before each start of a server and each measurement."""
    rows: list[Row] = field(default_factory=list)
    rounds_done: int = 0
    skipped: list[Case] = field(default_factory=list)
    """For which there was no time."""
    _servers: list[Server] = field(default_factory=list)
    _pace: float = 0.0
    """Seconds that all engines together took for a unit of work of the case before."""

    def run(self, engines: Sequence[Engine]) -> None:
        """All rounds. A server that does not start or ends too early is left out from there on."""
        self.rows = [Row(engine) for engine in engines]
        try:
            {"halt": self._halt, "restart": self._restart, "sequence": self._sequence}[self.plan.turns]()
        finally:
            stop_all(self._servers)

    def steps(self, engines: int) -> int:
        """How often `advance` is called at most."""
        quiet = sum(not case.busy for case in self.plan.cases)
        starts = self.plan.rounds if self.plan.turns == "restart" else 1
        return engines * (starts * (1 + quiet) + self.plan.rounds * len(self.plan.cases))

    def _halt(self) -> None:
        """Case by case, so that the time between the turns of two engines is short."""
        running = []
        for row in self.rows:
            server = self._start(row)
            if server:
                running.append((row, server))
                server.halt()
        for turn in self._rounds():
            for case in self.plan.cases:
                began = time.monotonic()
                if turn == 1 and began + self._pace * case.work > self.plan.ends:
                    self.skipped.append(case)
                    self.say(f"no time is left for {case}")
                if case in self.skipped:
                    continue
                for row, server in running:
                    server.resume()
                    self._measure(row, server, case, turn)
                    server.halt()
                self._pace = (time.monotonic() - began) / case.work

    def _restart(self) -> None:
        for turn in self._rounds():
            for row in self.rows:
                if not row.trouble:
                    with self._served(row) as server:
                        if server:
                            for case in self.plan.cases:
                                self._measure(row, server, case, turn, warm_up=True)

    def _sequence(self) -> None:
        for row in self.rows:
            with self._served(row) as server:
                if server:
                    for turn in range(1, self.plan.rounds + 1):
                        for case in self.plan.cases:
                            self._measure(row, server, case, turn)
        self.rounds_done = self.plan.rounds

    def _rounds(self) -> Iterator[int]:
        """The rounds from 1; ends early where the time does."""
        for turn in range(1, self.plan.rounds + 1):
            began = time.monotonic()
            yield turn
            self.rounds_done = turn
            now = time.monotonic()
            if turn < self.plan.rounds and now + (now - began) > self.plan.ends:
                self.say(f"the time is up after {turn} of {self.plan.rounds} rounds")
                return

    @contextmanager
    def _served(self, row: Row) -> Iterator[Server | None]:
        """A server for the block; None, and a note in the row, if it does not start."""
        server = self._start(row)
        try:
            yield server
        finally:
            if server:
                stop_all([server])
                self._servers.remove(server)

    def _start(self, row: Row) -> Server | None:
        self.advance(f"{row.engine.name}: starting")
        try:
            with interrupts_later():
                server = Server(row.engine, self.logs)
                self._servers.append(server)
            left = self.plan.ends - time.monotonic()
            server.wait_ready(max(1.0, min(self.plan.start_timeout_s, self.plan.start_share * left)))
        except BenchError as error:
            row.trouble = str(error)
            self.say(f"{row.label} is left out: {error}")
            return None
        if not row.ready_s:
            time.sleep(SETTLE_S)
            before = server.cpu_seconds()
            time.sleep(IDLE_S)
            row.idle_cpu = (server.cpu_seconds() - before) / IDLE_S
        row.ready_s.append(server.ready_s)
        self.say(f"{row.label}: ready after {server.ready_s:.1f} s")
        return server

    def _measure(self, row: Row, server: Server, case: Case, turn: int, *, warm_up: bool = False) -> None:
        """One case, if the engine takes part in it.

        In round 1 and with `warm_up` a short form of it comes first and is not kept, so that code and data
        are loaded and compiled.
        """
        if row.trouble or case.workload not in row.engine.workloads:
            return
        seed = (self.plan.seed * 1000 + turn) * 1000 + self.plan.cases.index(case)
        steps = [(f"round {turn}", case, seed)]
        if (warm_up or turn == 1) and not case.busy:
            short = case.shortened(self.plan.warmup_len, self.plan.warmup_users)
            steps.insert(0, ("warm-up", short, seed + 500))
        for what, sent, its_seed in steps:
            self.advance(f"{row.engine.name}: {what}, {case}")
            with busy_neighbour() if case.busy else nullcontext():
                report = server.measure(
                    sent.users("ids" if row.engine.offline else self.plan.prompts, its_seed),
                    concurrency=case.concurrency,
                    arrivals=() if sent is not case else case.arrivals(seed),
                    timeout_s=self.plan.timeout_s,
                )
            if sent is case:
                row.reports.setdefault(case, []).append(report)
            self.say(f"{what}: {row.label}, {case}: {report.output_throughput:.1f} tok/s")
            for error in report.errors:
                self.say(f"{row.label}, {case}: error: {error}")
            if server.ended():
                row.trouble = f"ended in {case}: {server.last_words()}"
                self.say(f"{row.label} {row.trouble}")
                return
        row.memory = server.memory()
        metrics = server.metrics()
        server.log.with_suffix(".metrics").write_text(metrics)
        row.preemptions = int(sum(float(count) for count in re.findall(PREEMPTIONS, metrics, re.MULTILINE)))
