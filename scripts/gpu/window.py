"""Runs jobs on the GPUs of a machine that is lent for minutes, as many at a time as there is room for.

    python scripts/gpu/window.py --limit 570 [--jobs FILE…] [--only NAME…]
    python scripts/gpu/window.py --plan 3 --gpus 2 --cores 32 --limit 570    # starts nothing

Jobs are begun in the order of the file (scripts/gpu/jobs.yaml; `Job` in pool.py has what a job is), each with
GPUs and processor cores of its own, in a process session of its own. One that takes too long is interrupted,
so that its output ends with where it was, and killed 10 seconds later. Prints each job's last lines, then one
table, and puts every output and the table into OUT as one archive.

The same command again goes on: jobs that have ended are skipped, those that were cut short begin anew, and
those that outlive a command are still running. Exit status: 0, or 1 if a job failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
from pool import Job, JobsError, Place, Pool, plan, read_jobs

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE_S = 10  # between an interrupt and the end
SHOWN_LINES, SHOWN_FAILED, SHOWN_CHARACTERS = 8, 15, 200
# The status is in a file because what outlives a command is no child of the next one.
WRAPPER = 'trap : INT; bash -eo pipefail -c "$0"; echo $? >"$1.new"; mv "$1.new" "$1"'


class Started(msgspec.Struct):
    """A process session, its place, the time of its start, and the interrupt's, in seconds since the boot."""

    pid: int
    place: Place
    start: float
    interrupted: float | None = None


class Ended(msgspec.Struct):
    """status: that of the command; None if it was cut short, as the time was over."""

    status: int | None
    seconds: float
    note: str = ""

    @property
    def result(self) -> str:
        if self.status is None:
            return "cut short"
        return f"failed ({self.status})" if self.status else "ok"


class State(msgspec.Struct):
    """What the next command has to know, by the names of the jobs."""

    running: dict[str, Started] = {}
    ended: dict[str, Ended] = {}


class Window:
    """Runs the jobs of a pool; `folder` has the outputs and the state."""

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        num_gpus: int,
        cores: Sequence[int],
        again: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._file = folder / "state.json"
        self.state = State()
        if self._file.exists():
            self.state = msgspec.json.decode(self._file.read_bytes(), type=State)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        done = {name for name, ended in self.state.ended.items() if ended.status is not None} - {*again}
        waiting = [job for job in jobs if job.name not in done and job.name not in self.state.running]
        self._pool = Pool(waiting, num_gpus, cores, 0.0)
        known = {job.name: job for job in jobs}
        for name, started in self.state.running.items():
            # One that this command does not name has its place nevertheless, and all the time that it needs.
            unnamed = Job(name=name, command="", seconds=0, limit=sys.maxsize, outlives=True)
            self._pool.running[known.get(name, unnamed)] = started.place, started.start

    def run(self, limit_s: float, clock: Callable[[], float] = time.monotonic, pause_s: float = 0.1) -> None:
        """Begin jobs and wait for them, for so long."""
        until = clock() + limit_s
        self._pool.until = until - GRACE_S
        try:
            while True:
                self._watch(clock())
                for job, place in self._pool.begin(clock()) if clock() < self._pool.until else ():
                    self._begin(job, place, clock())
                if not self._pool.running or clock() >= self._pool.until:
                    break
                time.sleep(pause_s)
        finally:
            self._cut(clock)

    def _begin(self, job: Job, place: Place, now: float) -> None:
        gpus = ",".join(map(str, place.gpus))
        print(f"{_clock()} {job.name}: GPU {gpus or '-'}, cores {_ranges(place.cores)}", flush=True)
        status = self._status(job.name)
        status.unlink(missing_ok=True)
        self.state.ended.pop(job.name, None)

        def settle() -> None:
            os.sched_setaffinity(0, place.cores)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it

        with self.log(job.name).open("wb") as log:
            child = subprocess.Popen(
                ["bash", "-c", WRAPPER, job.command, str(status)],
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "WINDOW": str(self._folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=settle,
            )
        self._children[job.name] = child
        self.state.running[job.name] = Started(child.pid, place, now)
        self._save()

    def _watch(self, now: float) -> None:
        """Note which jobs have ended; interrupt those that take too long, and kill those that go on."""
        for job in list(self._pool.running):
            started = self.state.running[job.name]
            if not self._is_alive(job.name):
                self._end(job, now, "took too long" if started.interrupted else "")
            elif started.interrupted is None and now - started.start > job.limit_s:
                _signal(started.pid, signal.SIGINT)
                started.interrupted = now
            elif started.interrupted is not None and now - started.interrupted > GRACE_S:
                _signal(started.pid, signal.SIGKILL)

    def _end(self, job: Job, now: float, note: str, *, cut: bool = False) -> None:
        started, file = self.state.running.pop(job.name), self._status(job.name)
        status = int(file.read_text()) if file.exists() else 137
        ended = Ended(None if cut else status, now - started.start, note)
        self.state.ended[job.name] = ended
        _signal(started.pid, signal.SIGKILL)  # what it has left behind
        self._pool.end(job)
        self._save()
        print(f"{_clock()} {job.name}: {ended.result} after {ended.seconds:.0f} s", flush=True)

    def _cut(self, clock: Callable[[], float]) -> None:
        """End what runs, but for what outlives this command."""
        self._watch(clock())
        left = [job for job in self._pool.running if not job.outlives]
        pids = {job.name: self.state.running[job.name].pid for job in left}
        for pid in pids.values():
            _signal(pid, signal.SIGINT)
        killed = time.monotonic() + GRACE_S
        while any(map(self._is_alive, pids)):
            if time.monotonic() > killed:
                for pid in pids.values():
                    _signal(pid, signal.SIGKILL)
            time.sleep(0.05)
        for job in left:
            self._end(job, clock(), "the time was over", cut=True)

    def _is_alive(self, name: str) -> bool:
        if name in self._children:
            self._children[name].poll()  # so that nothing is left of it
        try:
            stat = Path(f"/proc/{self.state.running[name].pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _status(self, name: str) -> Path:
        return self._folder / f"{name}.status"

    def _save(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self.state))
        new.replace(self._file)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,8 for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# ---- the report --------------------------------------------------------------------------------------


def lines_that_matter(job: Job, output: str, *, failed: bool) -> list[str]:
    """What `show` finds in a job's output, else its last line; more of the end if it failed."""
    lines = [line[:SHOWN_CHARACTERS] for line in output.splitlines() if line.strip()]
    found = [line for line in lines if job.show and re.search(job.show, line)][-SHOWN_LINES:]
    if failed:
        return found + lines[-SHOWN_FAILED:]
    return found or lines[-1:]


def report(jobs: Sequence[Job], state: State, log: Callable[[str], Path]) -> str:
    """The lines of each job that has begun, then the table."""
    parts, rows = [], ["| job | result | seconds | |", "|---|---|---|---|"]
    for job in jobs:
        ended = state.ended.get(job.name)
        result = "running" if job.name in state.running else "not begun"
        seconds = note = ""
        if ended is not None:
            result, seconds, note = ended.result, f"{ended.seconds:.0f}", ended.note
        if log(job.name).exists():
            output = log(job.name).read_text("utf-8", "replace")
            failed = ended is not None and ended.status != 0
            parts += [f"---- {job.name}", *lines_that_matter(job, output, failed=failed)]
        rows.append(f"| {job.name} | {result} | {seconds} | {note} |")
    return "\n".join([*parts, "", *rows])


def pack(folder: Path, out: Path) -> None:
    """Write everything in `folder` into one archive in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "window.tar.xz", "w:xz", preset=1) as archive:
        archive.add(folder, "window")


def machine() -> str:
    """What measurements name: GPUs, driver, versions, cores and day."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    versions = [f"{name} {version(name)}" for name in ("torch", "triton")]
    found = [f"{len(gpus)} x {gpus[0]}", *versions, f"{os.cpu_count()} cores", time.strftime("%Y-%m-%d")]
    return ", ".join(found)


def cores_by_sibling() -> list[int]:
    """The processor cores that this process may use; those that share a physical one stand together."""

    def siblings(core: int) -> tuple[int, int]:
        try:
            text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
            return int(re.split("[,-]", text)[0]), core
        except (OSError, ValueError):
            return core, core

    return sorted(os.sched_getaffinity(0), key=siblings)


def count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))


def chosen(files: Sequence[Path], only: Sequence[str]) -> list[Job]:
    """The jobs of these files whose names one of the patterns matches. Raises `JobsError`."""
    jobs = [job for file in files for job in read_jobs(file)]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise JobsError(f"two jobs are called {name!r}")
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise JobsError(f"--only {pattern}: there is no such job")
    return [job for job in jobs if any(fnmatch.fnmatch(job.name, pattern) for pattern in only)]


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--jobs", type=Path, nargs="+", default=[ROOT / "scripts/gpu/jobs.yaml"], metavar="FILE"
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="such as 'test-*'")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="of jobs that have ended")
    parser.add_argument(
        "--limit", type=float, default=570, help="seconds of this command (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/window"), help="of outputs and of the state"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp/window-out")))
    parser.add_argument(
        "--plan", type=int, metavar="CALLS", help="print when each job would run in so many calls"
    )
    parser.add_argument("--gpus", type=int, help="of the machine that is planned for")
    parser.add_argument("--cores", type=int, help="likewise")
    args = parser.parse_args(arguments)
    try:
        jobs = chosen(args.jobs, args.only)
    except JobsError as error:
        print(f"window: {error}", file=sys.stderr)
        return 2
    cores = cores_by_sibling()
    gpus = count_gpus() if args.gpus is None else args.gpus
    if args.plan:
        print("\n".join(plan(jobs, gpus, args.cores or len(cores), args.limit, args.plan)))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    window = Window(jobs, args.folder, gpus, cores, args.again)
    window.run(args.limit)
    text = report(jobs, window.state, window.log) + (f"\n\n{machine()}" if count_gpus() else "")
    (args.folder / "summary.md").write_text(text + "\n", "utf-8")
    pack(args.folder, args.out)
    print(f"\n{text}", flush=True)
    return int(any(ended.status for ended in window.state.ended.values()))


if __name__ == "__main__":
    sys.exit(main())
