"""The cache by content: hits, misses, files that are broken, folders that cannot be written, and two writers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import qopt
from qopt.cache import Arrays, Cache, code_digest, default_folder, digest_arrays

KEY: dict[str, Any] = {"model": "ab", "images": [1, 2], "eps": 0.1}
VALUE = {"0:gram": np.array([1.5, 2.5]), "b": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2))}


class Counted:
    """A computation that counts its calls."""

    def __init__(self, value: Arrays = VALUE) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> Arrays:
        self.calls += 1
        return self.value


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(one: Arrays, other: Arrays) -> bool:
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


def test_the_second_call_is_a_hit(tmp_path: Path) -> None:
    compute = Counted()
    for cache in (Cache(tmp_path), Cache(tmp_path)):
        assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert compute.calls == 1
    assert cache.hits == ["norms"]
    assert len(files(tmp_path)) == 1


def test_the_order_of_the_keys_does_not_matter(tmp_path: Path) -> None:
    cache, compute = Cache(tmp_path), Counted()
    cache.arrays("norms", KEY, compute)
    cache.arrays("norms", dict(reversed(KEY.items())), compute)
    assert compute.calls == 1


OTHER_KEYS: list[tuple[str, dict[str, Any]]] = [
    ("norms", {**KEY, "model": "ac"}),
    ("norms", {**KEY, "images": [2, 1]}),
    ("norms", {**KEY, "eps": 0.1000001}),
    ("norms", {**KEY, "more": None}),
    ("norms", {"model": "ab", "images": [1, 2]}),
    ("norms", {**KEY, "kind": "adversarial"}),
    ("norms", {**KEY, "code": "0"}),
    ("adversarial", KEY),
]


@pytest.mark.parametrize(("kind", "key"), OTHER_KEYS)
def test_another_key_is_a_miss(tmp_path: Path, kind: str, key: dict[str, Any]) -> None:
    cache, compute = Cache(tmp_path), Counted()
    cache.arrays("norms", KEY, compute)
    cache.arrays(kind, key, compute)
    assert compute.calls == 2
    assert cache.hits == []


def test_a_key_cannot_pose_as_another_kind(tmp_path: Path) -> None:
    cache, compute = Cache(tmp_path), Counted()
    cache.arrays("adversarial", KEY, compute)
    cache.arrays("norms", {**KEY, "kind": "adversarial"}, compute)
    assert len({path.name for path in files(tmp_path)}) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    cache, compute = Cache(None), Counted()
    assert cache.arrays("norms", KEY, compute) is cache.arrays("norms", KEY, compute)
    assert (compute.calls, cache.hits) == (2, [])


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def pickled(content: bytes) -> bytes:
    import pickle

    return pickle.dumps({"0:gram": [1.0]})


def object_archive(content: bytes) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, b=np.array([{}], dtype=object))
    return buffer.getvalue()


def array_file(content: bytes) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def flipped(content: bytes) -> bytes:
    middle = content.index(b"\x00\x00\x00\x00\x00\x00\xf8\x3f")  # the float64 1.5
    return content[:middle] + b"\x01" + content[middle + 1 :]


BROKEN: list[Callable[[bytes], bytes]] = [
    truncated, pickled, object_archive, array_file, flipped, lambda c: b"", lambda c: b"garbage", lambda c: c[:-1],
    lambda c: b"PK\x03\x04" + bytes(100),
]  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_a_miss_and_is_replaced(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache, compute = Cache(tmp_path), Counted()
    cache.arrays("norms", KEY, compute)
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert (compute.calls, cache.hits) == (2, ["norms"])


def test_a_folder_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    cache, compute = Cache(tmp_path / "cache"), Counted()
    assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert compute.calls == 2
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_folder_without_permission_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o500)
    forbidden = Path("/proc/qopt") if os.access(tmp_path / "cache", os.W_OK) else tmp_path / "cache"  # root in /proc
    cache = Cache(forbidden)
    compute = Counted()
    assert same(cache.arrays("norms", KEY, compute), VALUE)
    assert compute.calls == 1
    (tmp_path / "cache").chmod(0o700)
    assert files(tmp_path) == []


def test_an_error_of_the_computation_passes_and_keeps_nothing(tmp_path: Path) -> None:
    def fails() -> Arrays:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        Cache(tmp_path).arrays("norms", KEY, fails)
    assert files(tmp_path) == []


def test_objects_are_never_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        Cache(tmp_path).arrays("norms", KEY, Counted({"a": np.array([{}], dtype=object)}))
    assert files(tmp_path) == []


WRITE_MANY = """
import sys, time
from pathlib import Path
import numpy as np
from qopt.cache import Cache, code_digest
folder, writer = Path(sys.argv[1]), int(sys.argv[2])
code_digest()
(folder / f"ready{writer}").touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.001)
for number in range(40):
    Cache(folder / "cache").arrays("norms", {"round": number}, lambda: {"a": np.full(2000, writer)})
"""


def test_two_processes_may_write_the_same_key(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, str(tmp_path), str(n)]) for n in (1, 2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    cache = Cache(tmp_path / "cache")
    for round_ in range(40):
        found = cache.arrays("norms", {"round": round_}, Counted({"a": np.zeros(1)}))["a"]
        assert found.shape == (2000,)
        assert found[0] in (1, 2)
        assert (found == found[0]).all()
    assert len(cache.hits) == len(files(tmp_path / "cache")) == 40


PRINT_DIGEST = "import qopt.cache as c; print(c.__file__, c.code_digest())"


def digest_of(copy: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PRINT_DIGEST]
    out = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=True).stdout
    file, digest = out.split()
    assert Path(file).is_relative_to(copy)
    return digest


def test_a_changed_program_misses(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(qopt.__file__).parent, tmp_path / "qopt", ignore=ignored)
    first = digest_of(tmp_path)
    assert digest_of(tmp_path) == first
    source = tmp_path / "qopt" / "quant" / "scales.py"
    source.write_text(source.read_text() + "\n# another program\n")
    changed = digest_of(tmp_path)
    source.rename(source.with_name("other.py"))
    assert len({first, changed, digest_of(tmp_path)}) == 3


def test_the_digest_of_the_code_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counted()
    Cache(tmp_path).arrays("norms", KEY, compute)
    monkeypatch.setattr("qopt.cache.code_digest", lambda: code_digest()[::-1])
    Cache(tmp_path).arrays("norms", KEY, compute)
    assert compute.calls == 2


FOLDERS: list[tuple[dict[str, str], str]] = [
    ({"QOPT_CACHE": "/a/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a/b"),
    ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/qopt"),
    ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/qopt"),
    ({"QOPT_CACHE": "", "HOME": "/h"}, "/h/.cache/qopt"),
]


@pytest.mark.parametrize(("environment", "folder"), FOLDERS)
def test_the_default_folder(environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QOPT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(folder)


BASE = np.arange(6, dtype=np.float32)
DIFFERENT: list[tuple[NDArray[Any], ...]] = [
    (BASE,), (BASE.reshape(2, 3),), (BASE.astype(np.float64),), (BASE + 1,), (BASE[:5],), (BASE, BASE), (BASE[:0],), (),
    (BASE[:3], BASE[3:]), (BASE.astype(">f4"),), (BASE.view(np.int32),), (np.array(0.0),),
]  # fmt: skip


def test_digests_tell_shapes_types_and_values_apart() -> None:
    digests = [digest_arrays(*arrays) for arrays in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)


def test_digests_do_not_see_memory_layout() -> None:
    matrix = BASE.reshape(2, 3)
    assert digest_arrays(np.asfortranarray(matrix), matrix.T) == digest_arrays(matrix, np.ascontiguousarray(matrix.T))


def test_the_stored_key_is_json() -> None:
    with pytest.raises(TypeError):
        Cache(Path("unused")).arrays("norms", {"bad": object()}, Counted())
    assert json.dumps(KEY)
