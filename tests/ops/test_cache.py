"""The folder that compiled kernels are loaded from: nobody else may change it, nor what lies in it."""

import logging
import os
import resource
import stat
import tempfile
from pathlib import Path

import pytest

from microvllm.ops import cache
from microvllm.ops.cache import cache_folders, folder_problem, is_trusted, lacks_room
from microvllm.ops.cpu import build, calibration
from microvllm.ops.cpu.isa import usable_levels

NOBODY = 65534


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`microvllm` is to be below the folder `a/b`; the temporary folder is another."""
    cache.warn_once.cache_clear()
    cache._folder_of_this_process.cache_clear()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    base = tmp_path / "a" / "b"
    base.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    monkeypatch.setenv("HOME", os.devnull)  # no folder
    return base


def cache_folder() -> Path:
    return next(cache_folders())


def give_away(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, NOBODY, NOBODY)


def test_a_folder_of_ones_own_is_taken(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache_folder() == home / "microvllm" and not caplog.records
    assert not stat.S_IMODE((home / "microvllm").stat().st_mode) & 0o022


@pytest.mark.parametrize("place", ["..", ".", "microvllm"])
@pytest.mark.parametrize("how", ["writable", "another's"])
def test_a_folder_that_others_can_change_is_not(
    home: Path, caplog: pytest.LogCaptureFixture, place: str, how: str
) -> None:
    (home / "microvllm").mkdir()
    shared = (home / place).resolve()
    if how == "writable":
        shared.chmod(0o777)
    else:
        give_away(shared)
    with caplog.at_level(logging.WARNING):
        folder = cache_folder()
        assert cache_folder() == folder
    assert folder.parent == Path(tempfile.gettempdir()) and stat.S_IMODE(folder.stat().st_mode) == 0o700
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"other users can change {shared}" in line and str(folder) in line and "\n" not in line


def test_a_link_is_followed(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "shared" / "deep"
    other.mkdir(parents=True)
    (home / "microvllm").symlink_to(other)
    assert folder_problem(home / "microvllm") is None
    (tmp_path / "shared").chmod(0o777)
    assert str(folder_problem(home / "microvllm")).endswith("/shared")


def test_a_sticky_folder_on_the_way_is_safe_but_not_as_the_last(tmp_path: Path) -> None:
    inner = tmp_path / "sticky" / "ours"
    inner.mkdir(parents=True)
    inner.parent.chmod(0o1777)
    assert folder_problem(inner) is None
    inner.chmod(0o1777)
    assert str(folder_problem(inner)).endswith("/ours")


def test_a_private_folder_that_is_taken_already(home: Path) -> None:
    home.chmod(0o777)
    taken = Path(tempfile.gettempdir()) / f"microvllm-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    folder = cache_folder()
    assert folder != taken and stat.S_IMODE(folder.stat().st_mode) == 0o700 and cache_folder() == folder


@pytest.mark.parametrize("how", ["writable", "another's", "link", "fifo"])
def test_a_file_that_others_can_change_is_not_trusted(home: Path, how: str) -> None:
    file = home / "x.so"
    assert not is_trusted(file)
    file.write_bytes(b"x")
    file.chmod(0o755)
    assert is_trusted(file)
    if how == "writable":
        file.chmod(0o757)
    elif how == "another's":
        give_away(file)
    else:
        real = file.rename(home / "real.so")
        file.symlink_to(real) if how == "link" else os.mkfifo(file)
    assert not is_trusted(file)


def test_planted_kernels_are_compiled_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda command, library: library.write_bytes(b"compiled"))
    level = next(usable_levels())
    library = build.build_kernels(level)
    library.write_bytes(b"kept")
    assert build.build_kernels(level) == library and library.read_bytes() == b"kept"
    library.chmod(0o666)
    assert build.build_kernels(level) == library and library.read_bytes() == b"compiled"


def test_a_full_folder_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels that lie there already are taken all the same."""
    own, private = cache_folders()
    monkeypatch.setattr(build, "_compile", lambda command, library: library.write_bytes(b"compiled"))
    full = {own: "No space left on device"}
    monkeypatch.setattr(build, "lacks_room", lambda folder, size: full.get(folder))
    level = next(usable_levels())
    library = build.build_kernels(level)
    assert library.parent == private
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"compiled kernels are not kept in {own}, but in {private}: No space left on device"
    full[private] = "Disk quota exceeded"
    assert build.build_kernels(level) == library
    library.rename(own / library.name)
    assert build.build_kernels(level) == own / library.name
    (own / library.name).unlink()
    with pytest.raises(build.NoCompilerError) as caught:
        build.build_kernels(level)
    assert str(caught.value) == (
        f"kernels cannot be compiled: {own}: No space left on device; {private}: Disk quota exceeded"
    )
    assert "free 16 MB" in caught.value.remedy and "XDG_CACHE_HOME" in caught.value.remedy


def test_room_is_tried(tmp_path: Path) -> None:
    assert lacks_room(tmp_path, 1 << 16) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))  # Python ignores the signal
    try:
        assert lacks_room(tmp_path, 1 << 16) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lacks_room(tmp_path / "missing", 1) == "No such file or directory"
    assert not list(tmp_path.iterdir())


def test_the_compiler_writes_nothing_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its intermediate files would need room in the temporary folder, too."""
    environments = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> None:
        environments.append(env)
        Path(command[command.index("-o") + 1]).write_bytes(b"compiled")

    monkeypatch.setattr(build.subprocess, "run", run)
    library = build.build_kernels(next(usable_levels()))
    assert library.read_bytes() == b"compiled" and len(environments) == len(build.SOURCES) + 1
    assert {Path(env["TMPDIR"]).parent for env in environments} == {library.parent}


def test_a_planted_calibration_is_measured_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibration.Calibration(
        "this one", calibration.Tuning(), {"a": calibration.Comparison(1.0, 2.0, 0, 6)}
    )
    monkeypatch.setattr(calibration, "calibrate", lambda library: found)
    library = type("Library", (), {"_name": str(home / "kernels.so")})()
    assert calibration.calibrated(library) == found
    (file,) = home.iterdir()
    written = file.read_text()
    for text, mode in ((written.replace("2.0", "9.0"), 0o666), ("[" * 100_000, 0o600)):
        file.write_text(text)
        file.chmod(mode)
        assert calibration.calibrated(library) == found and file.read_text() == written
