"""The queue of a shared run: every piece is taken once at a time and done once, whoever dies, waits or fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from qopt.errors import QoptError, UsageError
from qopt.search.crew import attend, gather, serve
from qopt.search.lease import Heartbeat, Watch, is_gone, this_process
from qopt.search.pieces import Piece
from qopt.search.queue import LIMIT, Claim, Queue
from qopt.search.storage import close, journal_path, open_storage, shown

pytestmark = pytest.mark.long

ABOUT = {"conditions": "c", "version": "1"}
SERVE = """
import sys, time
from qopt.search.crew import serve
from qopt.search.queue import Queue

class Sleeps:
    ready = frozenset()
    def __call__(self, piece):
        print("took", piece.key, flush=True)
        time.sleep(piece.work["seconds"])
        return {"slept": piece.work["seconds"]}

queue = Queue.join(sys.argv[1], "s", beat=0.2)
print("done", serve(queue, Sleeps(), 1.0, print), flush=True)
"""


class Echo:
    """Answers with the piece's own work; fails where the work says so, and stops where that says so."""

    def __init__(self, *ready: str) -> None:
        self.ready: Set[str] = frozenset(ready)
        self.did: list[str] = []

    def __call__(self, piece: Piece) -> Mapping[str, Any]:
        self.did.append(piece.key)
        if "error" in piece.work:
            raise (piece.work["error"] == "mine" and UsageError("wrong", where="here")) or ValueError("two\nlines")
        if piece.work.get("stop"):
            raise KeyboardInterrupt
        return {"echo": piece.work["name"]}


def piece(key: str, group: str = "g", **work: Any) -> Piece:
    return Piece(key, group, {"name": f"plan {key}", **work})


def states(queue: Queue) -> list[str]:
    """Of all pieces, in the order in which they were put."""
    return [trial.state.name for trial in queue._view.get_trials(deepcopy=False)]


def take(queue: Queue, *ready: str) -> Claim:
    claim = queue.take(frozenset(ready))
    assert claim is not None
    return claim


@pytest.fixture(params=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"sqlite": f"sqlite:///{tmp_path}/queue.db", "journal": f"journal:{tmp_path}/queue.log"}[request.param]


@pytest.fixture
def create(url: str) -> Iterator[Callable[..., Queue]]:
    """Opens the queue as its coordinator."""
    with contextlib.ExitStack() as stack:

        def create(study: str = "s", about: Mapping[str, Any] = ABOUT, **times: float) -> Queue:
            queue = Queue.create(url, study, about, **times)
            stack.callback(queue.close)
            return queue

        yield create


@pytest.fixture
def join(url: str) -> Iterator[Callable[..., Queue]]:
    """Opens the queue as a worker of a name of its own."""
    with contextlib.ExitStack() as stack:

        def join(worker: str = "other", study: str = "s", **times: float) -> Queue:
            queue = Queue.join(url, study, **times)
            assert queue is not None
            queue.worker = worker
            stack.callback(queue.close)
            return queue

        yield join


def test_a_piece_is_taken_once_and_its_result_is_kept(create: Callable[..., Queue], join: Callable[..., Queue]) -> None:
    queue = create()
    queue.put([piece("a"), piece("b"), piece("a")])
    other = join()
    first, second = take(queue), take(other)
    assert {first.piece.key, second.piece.key} == {"a", "b"}
    assert queue.take() is None
    assert other.take() is None
    assert queue.done(first, {"x": 0.1 + 0.2, "n": 3})
    assert other.done(second, {"x": 5e-324})
    assert queue.results() == other.results() == {"a": {"x": 0.1 + 0.2, "n": 3}, "b": {"x": 5e-324}}
    assert not other.done(first, {"x": 0.0}), "what is done stays as it is"
    assert queue.results()["a"]["n"] == 3


def test_what_is_done_waiting_or_being_done_is_not_put_again(create: Callable[..., Queue]) -> None:
    queue = create()
    queue.put([piece("a"), piece("b"), piece("c")])
    queue.done(take(queue), {"x": 1})
    take(queue)
    queue.put([piece("a"), piece("b"), piece("c"), piece("d")])
    assert states(queue) == ["COMPLETE", "RUNNING", "WAITING", "WAITING"]


def test_a_repeated_run_reuses_what_was_done_in_this_study_or_another_of_its_conditions(
    create: Callable[..., Queue],
) -> None:
    first = create()
    first.put([piece("a"), piece("b")])
    first.done(take(first), {"x": 1})
    again, beside, other = create(), create("t"), create("u", {"conditions": "d"})
    assert again.results() == beside.results() == {"a": {"x": 1}}
    assert other.results() == {}
    beside.put([piece("a"), piece("b")])
    assert states(beside) == ["WAITING"]


def test_a_study_is_of_one_run(create: Callable[..., Queue], url: str) -> None:
    create()
    with pytest.raises(UsageError, match="study s: the study is of another run; choose another --study"):
        create("s", {"conditions": "another"})
    assert Queue.join(url, "t") is None


def test_there_is_nothing_to_join_before_the_coordinator_came(url: str) -> None:
    assert Queue.join(url, "s") is None
    assert not (journal_path(url) or Path(url.removeprefix("sqlite:///"))).exists()


def test_groups_that_are_ready_come_first_then_those_that_nobody_began(create: Callable[..., Queue]) -> None:
    queue = create()
    queue.put([piece(f"{group}{part}", group) for group in "abc" for part in (1, 2)])
    order = [take(queue, "b").piece.group, take(queue, "b").piece.group]
    order += [take(queue).piece.group for _ in range(4)]
    assert order[:2] == ["b", "b"]
    assert set(order[2:4]) == set(order[4:]) == {"a", "c"}


def test_the_coordinator_takes_plans_in_their_order_and_workers_each_in_their_own(
    create: Callable[..., Queue], join: Callable[..., Queue]
) -> None:
    queue = create()
    queue.put([piece(group, group) for group in "abcdefgh"])
    first = [queue.take(anything=True) for _ in range(3)]
    assert [claim.piece.key for claim in first if claim] == ["a", "b", "c"]
    assert len({take(join(f"w{number}")).piece.key for number in range(5)}) == 5
    assert join("w6").take() is None
    own = set()
    for number in range(4):
        create(f"t{number}", {"conditions": f"t{number}"}).put([piece(group, group) for group in "abcdefgh"])
        own.add(take(join(f"w{number}", f"t{number}")).piece.key)
    assert len(own) > 1


def test_a_coordinator_goes_on_without_any_worker(create: Callable[..., Queue]) -> None:
    queue, echo = create(), Echo()
    queue.put([piece("a"), piece("b")])
    assert gather(queue, ["b", "a", "b"], echo, print) == [{"echo": f"plan {key}"} for key in "bab"]
    assert echo.did == ["a", "b"]


def test_workers_end_with_the_run_or_idle(create: Callable[..., Queue], join: Callable[..., Queue]) -> None:
    queue, other, echo = create(), join(), Echo()
    queue.put([piece("a"), piece("b")])
    assert serve(other, echo, 0.1, print) == 2
    queue.put([piece("c")])
    queue.finish()
    assert serve(other, echo, None, print) == 0
    assert not create().finished, "a run that begins again is not over"
    assert serve(other, echo, 0.1, print) == 1


@pytest.mark.parametrize(("error", "reason"), [("mine", "here: wrong"), ("other", "ValueError: two lines")])
def test_a_piece_that_fails_is_left_to_others(
    create: Callable[..., Queue], join: Callable[..., Queue], error: str, reason: str
) -> None:
    queue, other = create(), join("w1")
    queue.put([piece("a", error=error)])
    assert attend(other, Echo()) == reason
    assert queue.revive() == [f"plan a failed on w1, tried again: {reason}"]
    assert queue.revive() == []
    assert other.take() is None, "not on the same worker again"
    with pytest.raises((UsageError, ValueError)):
        gather(queue, ["a"], Echo(), print)
    assert states(queue) == ["FAIL", "FAIL"]


def test_a_piece_that_fails_everywhere_ends_the_run_in_words(
    create: Callable[..., Queue], join: Callable[..., Queue]
) -> None:
    queue = create()
    queue.put([piece("a", error="other")])
    for number in range(LIMIT):
        assert attend(join(f"w{number}"), Echo())
        if number < LIMIT - 1:
            queue.revive()
    line = r"plan a: measuring failed 3 times \(got ValueError: two lines\); the last time on the worker w2"
    with pytest.raises(QoptError, match=line):
        queue.revive()


def test_an_interrupted_worker_puts_its_piece_back(create: Callable[..., Queue], join: Callable[..., Queue]) -> None:
    queue, other = create(), join()
    queue.put([piece("a", stop=True)])
    with pytest.raises(KeyboardInterrupt):
        serve(other, Echo(), 1.0, print)
    assert states(queue) == ["WAITING"]
    assert take(queue).piece.key == "a"


def test_pieces_that_keep_getting_lost_are_left_to_the_coordinator(
    create: Callable[..., Queue], join: Callable[..., Queue]
) -> None:
    queue, other, said = create(grace=0.0), join(), list[str]()
    queue.put([piece("a")])
    for _ in range(LIMIT):
        take(other)
        queue.revive()
        time.sleep(0.01)
        said += queue.revive()
    assert said == ["plan a was lost with other, tried again"] * LIMIT
    assert other.take() is None
    assert gather(queue, ["a"], Echo(), said.append) == [{"echo": "plan a"}]


def test_results_that_are_none_do_not_pass_for_some(create: Callable[..., Queue]) -> None:
    queue = create()
    queue._view.add_trial(optuna.create_trial(state=TrialState.COMPLETE, value=1.0))
    assert queue.results() == {}
    queue.put([piece("a")])
    assert take(queue).piece == piece("a")


def test_signs_of_life_go_on_while_a_piece_is_held(create: Callable[..., Queue]) -> None:
    queue = create(beat=0.05)
    queue.put([piece("a")])
    claim = take(queue)
    with queue.held(claim):
        time.sleep(0.5)
    (trial,) = queue._trials(TrialState.RUNNING)
    assert trial.user_attrs["lease"]["signs"] >= 2
    assert trial.user_attrs["lease"]["process"] == this_process()


def test_a_heartbeat_forgives_the_storage_and_ends_where_told() -> None:
    counts = []

    def beat(count: int) -> bool:
        counts.append(count)
        if len(counts) == 2:
            raise OSError
        return len(counts) < 4

    with Heartbeat(beat, 0.01):
        time.sleep(0.3)
    assert counts == [1, 2, 2, 3]


def test_a_watch_sees_leases_that_stand_still() -> None:
    watch = Watch(0.1)
    assert not watch.has_ended(1, None)
    assert not watch.has_ended(2, {"signs": 0})
    time.sleep(0.15)
    assert watch.has_ended(1, None)
    assert not watch.has_ended(2, {"signs": 1})
    assert not watch.has_ended(2, {"signs": 1})
    time.sleep(0.15)
    assert watch.has_ended(2, {"signs": 1})
    assert not watch.has_ended(3, {"signs": 1}), "seen for the first time"


@pytest.mark.skipif(not this_process(), reason="the system does not tell when a process began")
def test_processes_of_this_machine_are_seen_to_end() -> None:
    code = "from qopt.search.lease import this_process; print(this_process(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert not is_gone(name)
        process.kill()
        process.wait()
    assert is_gone(name)
    machine, pid, began = this_process().split("/")
    assert not is_gone(this_process())
    assert is_gone(f"{machine}/{pid}/{int(began) - 1}"), "another process had the number before"
    for unknown in ("", f"elsewhere/{pid}/1", machine, f"{machine}/x/1"):
        assert not is_gone(unknown)


def begin(url: str) -> subprocess.Popen[str]:
    """A worker in a process of its own, which sleeps."""
    return subprocess.Popen([sys.executable, "-c", SERVE, url], stdout=subprocess.PIPE, text=True)


def test_a_worker_that_stands_still_loses_its_piece_and_cannot_enter_it_later(
    create: Callable[..., Queue], url: str
) -> None:
    queue, echo, said = create(grace=1.0), Echo(), list[str]()
    queue.put([piece("a", seconds=0.3)])
    with begin(url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "took a\n"
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert gather(queue, ["a"], echo, said.append) == [{"echo": "plan a"}]
        finally:
            os.kill(process.pid, signal.SIGCONT)
        process.stdout.read()
    assert process.returncode == 0
    assert echo.did == ["a"]
    assert [words[:16] for words in said] == ["plan a was lost "]
    assert states(queue) == ["FAIL", "COMPLETE"]
    assert queue.results() == {"a": {"echo": "plan a"}}


URLS = {
    "postgresql://user:secret@host:5/name": "postgresql://user:***@host:5/name",
    "postgresql://user@/name?host=dir&password=secret&sslpassword=secret": "postgresql://user@/name?host=dir",
    "sqlite:///file.db": "sqlite:///file.db",
    "journal:file": "journal:file",
    "runs.log": "runs.log",
    "no url with secret": "--storage",
}


@pytest.mark.parametrize(("text", "words"), URLS.items())
def test_urls_are_shown_without_secrets(text: str, words: str) -> None:
    assert shown(text) == words


REFUSED = {
    "nothing": "--storage: not a storage (expected postgresql://USER@HOST/DATABASE, sqlite:///FILE or journal:FILE, "
    "got 'nothing')",
    "user:secret@host/x": "--storage: not a storage (expected postgresql://USER@HOST/DATABASE, sqlite:///FILE or "
    "journal:FILE, got 'host/x')",
    "ftp://user:secret@host/x": "--storage: not a storage (expected postgresql://USER@HOST/DATABASE, sqlite:///FILE or "
    "journal:FILE, got ftp://...)",
    "oracle://user:secret@host/x": "--storage: the database's driver is not installed (got oracle",
    "postgresql://user:secret@127.0.0.1:1/x": "postgresql://user:***@127.0.0.1:1/x: cannot use the storage (got ",
    "sqlite:////proc/none/x.db": "sqlite:////proc/none/x.db: cannot use the storage (got unable to open database file)",
    "journal:/proc/none/x": "journal:/proc/none/x: cannot use the storage (got ",
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_storages_that_do_not_answer(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(text, create=True)
    assert str(caught.value).startswith(words)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_coordinators_may_make_the_tables_at_once(tmp_path: Path) -> None:
    code = "import sys; from qopt.search.queue import Queue; Queue.create(sys.argv[1], 's', {'conditions': 'c'})"
    url = f"sqlite:///{tmp_path}/new.db"
    processes = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    storage = open_storage(url, create=False)
    assert storage is not None
    assert [study.study_name for study in storage.get_all_studies()] == ["s"]
    close(storage)
