"""A queue of work that processes on many machines share: each piece is taken once at a time, and done once.

It is one Optuna study: its trials are the pieces, and a trial's state is who may work on it. Nothing in it can run
code: pieces, results and what the study is about are plain JSON.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, final

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from qopt.errors import QoptError, UsageError
from qopt.search.lease import BEAT, GRACE, Heartbeat, Watch, this_process
from qopt.search.pieces import Piece, Result
from qopt.search.storage import close, open_storage, quiet, reaching, shown
from qopt.seeds import derive

LIMIT: Final = 3
"""Errors of one piece after which the run ends; pieces that were lost as often are left to the coordinator."""

WAIT: Final = 1.0
"""Seconds between looks for a study that is not there yet."""

_LIVE = (TrialState.WAITING, TrialState.RUNNING)


@final
@dataclass(frozen=True)
class Claim:
    """A piece that this process has taken, with its number in the storage."""

    piece: Piece
    number: int


@final
class Queue:
    """One process's view of the pieces of one study. `create` and `join` make one.

    Args:
        storage: where the study is.
        url: of the storage.
        study: its name.
        beat: seconds between signs of life.
        grace: seconds without one after which whoever took a piece counts as gone.
    """

    def __init__(self, storage: BaseStorage, url: str, study: str, *, beat: float = BEAT, grace: float = GRACE) -> None:
        self.url, self.study = url, study
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self._storage, self._beat, self._watch = storage, beat, Watch(grace)
        with self._reaching():
            self._view = optuna.load_study(study_name=study, storage=storage)
            self._id = storage.get_study_id_from_name(study)
        self._known: dict[str, Result] = {}
        self._asked: set[str] = set()

    @staticmethod
    def create(url: str, study: str, about: Mapping[str, Any], **times: float) -> Queue:
        """Open the study for the run that ``about`` describes, and make it where it is new.

        ``about["conditions"]`` is what results depend on beside the piece; results of other studies in the storage that
        have it in common are taken over.

        Raises:
            UsageError: the storage fails, or the study is of a run with other conditions.
        """
        storage = open_storage(url, create=True)
        assert storage is not None
        with reaching(url), quiet(), suppress(DuplicatedStudyError):
            optuna.create_study(study_name=study, storage=storage)
        queue = Queue(storage, url, study, **times)
        try:
            queue._adopt(about)
        except BaseException:
            queue.close()
            raise
        return queue

    @staticmethod
    def join(url: str, study: str, *, wait: float = 0.0, **times: float) -> Queue | None:
        """Open a study that a run has begun; None where for ``wait`` seconds there is none of this name.

        Raises:
            UsageError: the storage fails.
        """
        storage, until = None, time.monotonic() + wait
        while True:
            storage = storage or open_storage(url, create=False)
            if storage is not None:
                with reaching(url):
                    names = {one.study_name for one in storage.get_all_studies() if "qopt" in one.user_attrs}
                if study in names:
                    return Queue(storage, url, study, **times)
            if time.monotonic() >= until:
                if storage is not None:
                    close(storage)
                return None
            time.sleep(WAIT)

    @property
    def about(self) -> Mapping[str, Any]:
        """What the run that began the study said of itself."""
        with self._reaching():
            found = self._storage.get_study_user_attrs(self._id).get("qopt")
        return found if isinstance(found, Mapping) else {}

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        with self._reaching():
            return bool(self._storage.get_study_user_attrs(self._id).get("finished"))

    def finish(self) -> None:
        """Tell the workers that the run has ended."""
        with self._reaching():
            self._storage.set_study_user_attr(self._id, "finished", True)

    def close(self) -> None:
        """Let go of the storage."""
        close(self._storage)

    def put(self, pieces: Sequence[Piece]) -> None:
        """Add those pieces that are neither done nor waiting nor being worked on."""
        self._asked |= {piece.key for piece in pieces}
        known = {_piece(trial).key for trial in self._trials(*_LIVE)} | self.results().keys()
        for piece in {piece.key: piece for piece in pieces}.values():
            if piece.key not in known:
                self._add(piece)

    def take(self, ready: Set[str] = frozenset(), *, anything: bool = False) -> Claim | None:
        """A piece that nobody else has, None where there is none: of a group that is ``ready``, else of one that nobody
        has begun, else any.

        With ``anything`` the first of equals. Without, those are left that failed here before, or were lost `LIMIT`
        times, and every worker has an order of its own, for those who want the same piece wait for each other.
        """
        trials = self._trials(*_LIVE, TrialState.COMPLETE)
        begun = {_piece(trial).group for trial in trials if trial.state != TrialState.WAITING}
        waiting = [(trial, _piece(trial)) for trial in trials if trial.state == TrialState.WAITING]

        def order(row: tuple[FrozenTrial, Piece]) -> tuple[bool, bool, int]:
            trial, piece = row
            own = trial.number if anything else derive(0, self.worker, piece.group)
            return piece.group not in ready, piece.group in begun, own

        waiting.sort(key=order)
        for trial, piece in waiting:
            if not anything and (piece.attempts >= LIMIT or self.worker in piece.failed_on):
                continue
            with self._reaching():
                if self._begin(trial._trial_id):
                    return Claim(piece, trial._trial_id)
        return None

    @contextmanager
    def held(self, claim: Claim) -> Iterator[None]:
        """Around the work on a piece: gives signs of life. A process that is interrupted puts the piece back."""
        try:
            with Heartbeat(lambda count: self._sign(claim.number, count), self._beat):
                yield
        except KeyboardInterrupt:
            with suppress(QoptError):
                self._end(claim, TrialState.WAITING, lease=None)
            raise

    def done(self, claim: Claim, result: Result) -> bool:
        """Enter the result; False where the piece was given to somebody else meanwhile."""
        return self._end(claim, TrialState.COMPLETE, result=dict(result))

    def failed(self, claim: Claim, reason: str) -> None:
        """Say why the piece could not be done; the coordinator puts it back."""
        self._end(claim, TrialState.FAIL, error={"worker": self.worker, "reason": reason})

    def results(self) -> Mapping[str, Result]:
        """By key, what is done in this study or was done before it under the same conditions."""
        for trial in self._trials(TrialState.COMPLETE):
            self._known.setdefault(_piece(trial).key, trial.user_attrs.get("result", {}))
        return self._known

    def revive(self) -> list[str]:
        """Put back what was put by this process and failed, or was taken by somebody who is gone; words about each.

        Raises:
            QoptError: a piece failed `LIMIT` times.
        """
        for trial in self._trials(TrialState.RUNNING):
            if self._watch.has_ended(trial._trial_id, trial.user_attrs.get("lease")):
                self._end(Claim(_piece(trial), trial._trial_id), TrialState.FAIL)
        trials = self._trials(*_LIVE, TrialState.FAIL, TrialState.COMPLETE)
        kept = {_piece(trial).key for trial in trials if trial.state != TrialState.FAIL}
        lost = dict.fromkeys(_piece(trial).key for trial in trials if trial.state == TrialState.FAIL)
        missing = [key for key in lost if key in self._asked and key not in kept and key not in self._known]
        return [self._put_back(key, [one for one in trials if _piece(one).key == key]) for key in missing]

    def _put_back(self, key: str, attempts: list[FrozenTrial]) -> str:
        last, errors = _piece(attempts[-1]), [one.user_attrs["error"] for one in attempts if "error" in one.user_attrs]
        what = str(last.work.get("name", key[:12]))
        if len(errors) >= LIMIT:
            raise QoptError(
                f"measuring failed {len(errors)} times", where=what, got=str(errors[-1]["reason"]),
                fix=f"the last time on the worker {errors[-1]['worker']}",
            )  # fmt: skip
        failed_on = tuple(dict.fromkeys(str(error["worker"]) for error in errors))
        self._add(Piece(key, last.group, last.work, failed_on, len(attempts)))
        if "error" in attempts[-1].user_attrs:
            return f"{what} failed on {errors[-1]['worker']}, tried again: {errors[-1]['reason']}"
        holder = (attempts[-1].user_attrs.get("lease") or {}).get("worker", "a worker")
        return f"{what} was lost with {holder}, tried again"

    def _adopt(self, about: Mapping[str, Any]) -> None:
        conditions = about["conditions"]
        with self._reaching():
            before = self._storage.get_study_user_attrs(self._id).get("qopt")
            if before is not None and before.get("conditions") != conditions:
                raise UsageError(
                    "the study is of another run", where=f"{shown(self.url)} study {self.study}",
                    fix="choose another --study",
                )  # fmt: skip
            for one in self._storage.get_all_studies():
                if one.study_name != self.study and one.user_attrs.get("qopt", {}).get("conditions") == conditions:
                    number = self._storage.get_study_id_from_name(one.study_name)
                    for trial in self._storage.get_all_trials(number, deepcopy=False, states=(TrialState.COMPLETE,)):
                        self._known.setdefault(_piece(trial).key, trial.user_attrs.get("result", {}))
            self._storage.set_study_user_attr(self._id, "finished", False)
            self._storage.set_study_user_attr(self._id, "qopt", dict(about))

    def _add(self, piece: Piece) -> None:
        attrs = {
            "key": piece.key, "group": piece.group, "work": dict(piece.work), "failed_on": list(piece.failed_on),
            "attempts": piece.attempts,
        }  # fmt: skip
        with self._reaching():
            self._view.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attrs))

    def _begin(self, number: int) -> bool:
        try:
            if not self._storage.set_trial_state_values(number, state=TrialState.RUNNING):
                return False
            self._storage.set_trial_user_attr(number, "lease", self._lease(0))
        except UpdateFinishedTrialError:
            return False
        return True

    def _sign(self, number: int, count: int) -> bool:
        try:
            self._storage.set_trial_user_attr(number, "lease", self._lease(count))
        except UpdateFinishedTrialError:
            return False
        return True

    def _lease(self, count: int) -> dict[str, Any]:
        return {"worker": self.worker, "process": this_process(), "signs": count}

    def _end(self, claim: Claim, state: TrialState, **attrs: object) -> bool:
        """Leave a piece in a state; False where somebody else ended it."""
        with self._reaching():
            try:
                for name, value in attrs.items():
                    self._storage.set_trial_user_attr(claim.number, name, value)
                return self._storage.set_trial_state_values(claim.number, state=state)
            except UpdateFinishedTrialError:
                return False

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        with self._reaching():
            return [one for one in self._view.get_trials(deepcopy=False, states=states) if "key" in one.user_attrs]

    def _reaching(self) -> Any:
        return reaching(self.url)


def _piece(trial: FrozenTrial) -> Piece:
    attrs = trial.user_attrs
    return Piece(
        str(attrs["key"]), str(attrs["group"]), attrs["work"], tuple(attrs["failed_on"]), int(attrs["attempts"])
    )
