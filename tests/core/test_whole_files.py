"""Killed writers, full disks, folders that cannot be written: the old content or the new, never half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qopt.errors import UsageError
from qopt.files import write_atomic, write_folder

OLD, NEW = b"old" * 1000, b"new" * 2_000_000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 1000])
def test_what_is_written_is_read(tmp_path: Path, content: bytes) -> None:
    for _ in range(2):
        write_atomic(tmp_path / "a.bin", content)
        assert (tmp_path / "a.bin").read_bytes() == content
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a.bin", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == mode


def test_a_reader_that_is_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, OLD)
    with path.open("rb") as reader:
        head = reader.read(10)
        write_atomic(path, NEW)
        assert head + reader.read() == OLD
    assert path.read_bytes() == NEW


WRITE_FOREVER = """
import sys
from pathlib import Path
from qopt.files import write_atomic
path = Path(sys.argv[1])
contents = [b"old" * 1000, b"new" * 2_000_000]
path.with_name("ready").touch()
for round in range(1_000_000):
    write_atomic(path, contents[round % 2])
"""


def test_kill_9_leaves_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, OLD)
    found = []
    for round_ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
        while not (tmp_path / "ready").exists():
            time.sleep(0.001)
        time.sleep(0.002 * round_)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(10) == -signal.SIGKILL
        (tmp_path / "ready").unlink()
        found.append(path.read_bytes())
        assert found[-1] in (OLD, NEW)
    leftovers = [name for name in names(tmp_path) if name != "a.bin"]
    assert [name for name in leftovers if not (name.startswith(".a.bin.") and name.endswith(".part"))] == []
    assert leftovers, "no writer was killed in the middle: the test shows nothing"


def test_plain_writing_would_be_caught(tmp_path: Path) -> None:
    """The loop above is sharp enough: a writer that truncates and writes leaves halves."""
    path = tmp_path / "a.bin"
    code = WRITE_FOREVER.replace("from qopt.files import write_atomic", "write_atomic = Path.write_bytes")
    for round_ in range(60):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        while not (tmp_path / "ready").exists():
            time.sleep(0.001)
        time.sleep(0.001 * (round_ % 10))
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        (tmp_path / "ready").unlink()
        if path.exists() and path.read_bytes() not in (OLD, NEW):
            return
    pytest.fail("sixty killed writers and no half-written file")


FILES = {"a.json": b"{}", "model.onnx": NEW, "z.txt": b"last"}


def test_a_folder_is_made_and_filled(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "out", FILES)
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep" / "out").iterdir()} == FILES


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.json").write_text("old")
    write_folder(tmp_path, FILES)
    assert names(tmp_path) == sorted([*FILES, "mine.txt"])
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError) as caught:
        write_folder(tmp_path / "out", FILES)
    assert str(caught.value) == f"{tmp_path / 'out'}: cannot write the output (got File exists)"
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/proc/qopt")  # root writes everywhere but there
    with pytest.raises(UsageError, match="cannot write the output"):
        write_folder(folder, FILES)


def test_a_folder_in_the_place_of_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "z.txt").mkdir()
    (tmp_path / "z.txt" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="cannot write the output"):
        write_folder(tmp_path, {"z.txt": b"x"})
    assert names(tmp_path) == ["z.txt"]


def test_a_name_too_long_leaves_the_old_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(OLD)
    with pytest.raises(UsageError, match="File name too long"):
        write_folder(tmp_path, {"a.json": NEW, "n" * 300: b"x"})
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == OLD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_changes_nothing(small_disk: Path) -> None:
    before = {"a.json": b"before", "model.onnx": OLD}
    write_folder(small_disk, before)
    with pytest.raises(UsageError, match="No space left on device"):
        write_folder(small_disk, FILES)
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


def test_a_full_disk_leaves_no_part_of_one_file(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(small_disk / "a.bin", NEW)
    assert names(small_disk) == []
