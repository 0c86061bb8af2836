"""Jobs on a machine with GPUs, which are pretended here: who runs where, and what becomes of processes."""

from __future__ import annotations

import functools
import os
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_tools import ROOT, load_script

GPU_SCRIPTS = ROOT / "scripts" / "gpu"
CORES = sorted(os.sched_getaffinity(0))


@functools.cache
def script(name: str) -> ModuleType:
    sys.path.insert(0, str(GPU_SCRIPTS))  # where it finds its parts, as when it is run
    try:
        return load_script(f"gpu/{name}")
    finally:
        sys.path.remove(str(GPU_SCRIPTS))


def job(name: str, gpus: Any = 0, seconds: int = 10, **options: Any) -> Any:
    return script("pool").Job(
        **{"name": name, "command": "true", "gpus": gpus, "seconds": seconds, **options}
    )


def pool(jobs: Sequence[Any], gpus: int = 2, cores: int = 8, until: float = 1000.0) -> Any:
    return script("pool").Pool(list(jobs), gpus, range(cores), until)


def begun(pool: Any, now: float = 0.0) -> dict[str, tuple[int, ...]]:
    return {job.name: place.gpus for job, place in pool.begin(now)}


def test_jobs_that_share_a_gpu_leave_others_whole() -> None:
    made = pool([job("a", 1, share=0.5), job("b", 1, share=0.5), job("c", 1), job("d", 1, share=0.25)])
    assert begun(made) == {"a": (0,), "b": (0,), "c": (1,)}


def test_what_waits_for_a_gpu_claims_the_one_that_is_free_first() -> None:
    for first, second, shared in ((90, 80, {"shares": (0,)}), (80, 90, {})):
        jobs = [
            job("half", 1, share=0.5, seconds=first),
            job("alone", 1, second),
            job("next", 1),
            job("shares", 1, share=0.25),
        ]
        assert begun(pool([*jobs, job("host")], cores=10)) == {
            **{"half": (0,), "alone": (1,), "host": ()},
            **shared,
        }


def test_a_job_on_all_gpus_waits_for_the_last_and_is_not_overtaken() -> None:
    jobs = [job("a", 1), job("b", 1, 50), job("all", "all"), job("behind", 1, share=0.25)]
    made = pool(jobs)
    assert begun(made) == {"a": (0,), "b": (1,)}
    made.end(jobs[0])
    assert begun(made, 10.0) == {}
    made.end(jobs[1])
    assert begun(made, 50.0) == {"all": (0, 1)}


def test_nothing_begins_that_cannot_end_in_time_but_what_outlives_it() -> None:
    jobs = [job("late", 1, 60), job("outlives", 0, 600, outlives=True), job("in time", 1, 40)]
    assert begun(pool(jobs, until=100.0), now=50.0) == {"outlives": (), "in time": (0,)}


def test_a_machine_without_the_gpus_of_a_job_leaves_it_out() -> None:
    jobs = [job("two", 2), job("all", "all"), job("one", 1)]
    assert begun(pool(jobs, gpus=1)) == {"all": (0,)}
    assert begun(pool(jobs, gpus=0)) == {}


def test_cores_are_not_shared_and_not_taken_from_who_waits_for_them() -> None:
    jobs = [job("a", cores=3), job("wide", cores=6), job("small", cores=2), job("wider", cores=99)]
    made = pool(jobs)
    ((first, place),) = made.begin(0.0)
    assert first.name == "a" and place.cores == (0, 1, 2), "`small` would put `wide` off"
    made.end(jobs[0])
    assert [(each.name, place.cores) for each, place in made.begin(1.0)] == [
        ("wide", (0, 1, 2, 3, 4, 5)),
        ("small", (6, 7)),
    ]
    made.end(jobs[1])
    made.end(jobs[2])
    ((_, place),) = made.begin(2.0)
    assert len(place.cores) == 8, "as many as there are"


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, "all"]),
            st.sampled_from([0.25, 0.5, 1.0]),
            st.integers(1, 50),
            st.integers(1, 6),
        ),
        max_size=14,
    ),
    st.integers(1, 3),
)
def test_no_place_is_given_twice_and_each_job_runs_once(
    kinds: list[tuple[Any, float, int, int]], gpus: int
) -> None:
    jobs = [
        job(str(i), count, seconds, share=share, cores=cores)
        for i, (count, share, seconds, cores) in enumerate(kinds)
    ]
    made, now, seen = pool(jobs, gpus=gpus, cores=6, until=1e9), 0.0, set[str]()
    while True:
        for each, _ in made.begin(now):
            assert each.name not in seen
            seen.add(each.name)
        places = [place for place, _ in made.running.values()]
        taken = [core for place in places for core in place.cores]
        assert len(taken) == len(set(taken))
        for gpu in range(gpus):
            assert sum(place.share for place in places if gpu in place.gpus) <= 1
        if not made.running:
            break
        first = min(made.running, key=lambda each: made.running[each][1] + each.seconds)
        now = made.running[first][1] + first.seconds
        made.end(first)
    assert seen == {each.name for each in jobs if each.gpus != 2 or gpus >= 2}, (
        "a machine's GPUs are all used"
    )


def test_a_plan_has_each_call_and_what_is_left_out() -> None:
    jobs = [job("a", 1, 60), job("b", 1, 50), job("c", 1, 500), job("host", 0, 150, outlives=True)]
    assert script("pool").plan(jobs, 1, 8, 100.0, 2) == [
        "call 1",
        "      0 to    60 s  GPU 0      2 cores  a",
        "      0 to   150 s  GPU -      2 cores  host",
        "  100 s, 60 of 100 seconds of GPUs are planned",
        "call 2",
        "      0 to    50 s  GPU 0      2 cores  b",
        "  50 s, 50 of 100 seconds of GPUs are planned",
        "  left out: c",
    ]


# ---- processes -----------------------------------------------------------------------------------------


def window(jobs: Sequence[Any], folder: Path, **options: Any) -> Any:
    return script("window").Window(jobs, folder, options.pop("gpus", 2), CORES, **options)


def results(made: Any) -> dict[str, str]:
    return {name: ended.result for name, ended in made.state.ended.items()}


def test_jobs_run_where_they_were_placed_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    jobs = [
        job("one", 1, command='echo "GPU $CUDA_VISIBLE_DEVICES"; echo more >&2', cores=1),
        job("fails", command="false\necho not reached", cores=1),
        job("both", "all", command='echo "GPU $CUDA_VISIBLE_DEVICES"; nproc', cores=1),
    ]
    made = window(jobs, tmp_path)
    made.run(1000.0, pause_s=0.01)
    assert results(made) == {"one": "ok", "fails": "failed (1)", "both": "ok"}
    assert made.log("one").read_text() == "GPU 0\nmore\n" and made.log("fails").read_text() == ""
    assert made.log("both").read_text() == "GPU 0,1\n1\n"
    again = window([*jobs, job("new")], tmp_path, again=["fails"])
    assert [each.name for each in again._pool.waiting] == ["fails", "new"]


def lines_of(path: Path) -> Callable[[], bool]:
    return lambda: path.exists() and "ready" in path.read_text()


WAITS = f"{sys.executable} -c 'import signal; print(\"ready\", flush=True); signal.pause()'"


def test_a_job_that_takes_too_long_is_interrupted_and_says_where_it_was(tmp_path: Path) -> None:
    """The time is over as soon as the job is ready."""
    jobs = [job("waits", command=f"{WAITS}\necho not reached", cores=1), job("behind", cores=len(CORES))]
    made = window(jobs, tmp_path)
    is_ready = lines_of(made.log("waits"))
    made.run(1e6, clock=lambda: 1000.0 * is_ready(), pause_s=0.01)
    assert results(made) == {"waits": "failed (130)", "behind": "ok"}
    assert made.state.ended["waits"].note == "took too long"
    output = made.log("waits").read_text()
    assert output.startswith("ready\nTraceback") and output.endswith("KeyboardInterrupt\n")


def test_what_deafens_itself_is_killed(tmp_path: Path) -> None:
    deaf = WAITS.replace("import signal;", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);")
    made = window(
        [job("deaf", command=deaf.replace("signal.pause()", "[signal.pause() for _ in iter(int, 1)]"))],
        tmp_path,
    )
    is_ready, times = lines_of(made.log("deaf")), iter(range(1000, 10**9, 20))
    made.run(1e12, clock=lambda: float(next(times)) if is_ready() else 0.0, pause_s=0.01)
    assert results(made) == {"deaf": "failed (137)"} and made.log("deaf").read_text() == "ready\n"


def test_the_next_command_goes_on_with_what_outlives_the_first(tmp_path: Path) -> None:
    """The first one's time is over as soon as both jobs are ready."""
    command = f"echo ready; until [ -e {tmp_path}/go ]; do sleep 0.01; done; echo behind; exit 3"
    stays = job("stays", command=command, cores=1, outlives=True, limit=10**6)
    jobs = [stays, job("cut", command=WAITS, cores=1), job("late", cores=1, seconds=10**7)]
    first = window(jobs, tmp_path)
    ready = [lines_of(first.log(name)) for name in ("stays", "cut")]
    first.run(1000.0, clock=lambda: 2000.0 * all(each() for each in ready), pause_s=0.01)
    assert results(first) == {"cut": "cut short"} and list(first.state.running) == ["stays"]
    second = window(jobs, tmp_path)
    assert [each.name for each in second._pool.waiting] == ["cut", "late"]
    other = window([job("other", cores=99)], tmp_path)
    other._pool.until = 1000.0
    assert other._pool.begin(0.0) == [], "one core has another job, which it does not name"
    (tmp_path / "go").touch()
    second = window(jobs[:1], tmp_path)
    second.run(1000.0, clock=lambda: 3000.0, pause_s=0.01)
    assert results(second) == {"cut": "cut short", "stays": "failed (3)"}
    assert second.log("stays").read_text() == "ready\nbehind\n"
    first._children["stays"].wait()


def test_the_command_prints_a_table_and_packs_all_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, out = tmp_path / "jobs.yaml", tmp_path / "folder", tmp_path / "out"
    file.write_text(
        "- {name: speed-a, seconds: 5, cores: 1, show: tok/s, command: 'echo 7 tok/s; echo behind'}\n"
        "- {name: speed-b, seconds: 5, cores: 1, command: 'echo why; exit 4'}\n"
        "- {name: test-c, seconds: 5, command: 'echo not chosen'}\n"
    )
    options = ["--jobs", str(file), "--only", "speed-*", "--folder", str(folder), "--out", str(out)]
    assert script("window").main([*options, "--gpus", "1"]) == 1
    printed = capsys.readouterr().out
    assert "---- speed-a\n7 tok/s\n---- speed-b\nwhy\n" in printed
    table = re.search(
        r"^\| speed-a \| ok \| \d+ \|  \|\n\| speed-b \| failed \(4\) \| \d+ \|  \|$", printed, re.M
    )
    assert table is not None and "test-c" not in printed
    with tarfile.open(out / "window.tar.xz") as archive:
        assert {"window/speed-a.log", "window/summary.md", "window/state.json"} <= {*archive.getnames()}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- {name: a, command: x}", "Object missing required field `seconds` - at `$[0]`"),
        ("- {name: a, command: x, seconds: 1, gpu: 1}", "Object contains unknown field `gpu` - at `$[0]`"),
        ("- {name: a, command: x, seconds: 1, gpus: many}", "Invalid enum value 'many' - at `$[0].gpus`"),
        ("a: [", "while parsing a flow node"),
    ],
)
def test_a_bad_file_of_jobs_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(text)
    assert script("window").main(["--jobs", str(file)]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"window: {file}: {problem}") and found.count("\n") == 1


def test_the_jobs_of_the_repository_name_files_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = script("pool").read_jobs(GPU_SCRIPTS / "jobs.yaml")
    for each in jobs:
        words = each.command.replace("\\\n", " ").split()
        paths = [word for word in words if word.startswith(("scripts/", "tests/"))]
        assert all(list(ROOT.glob(path)) for path in paths), each.name
    assert script("window").main(["--plan", "1", "--gpus", "2", "--cores", "32"]) == 0
    assert msgspec.json.encode(jobs) and capsys.readouterr().out.startswith("call 1\n")
