"""The journal of a search: every measured plan, durable before the next one begins, for a run that is interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, final

from qopt.errors import PlanError, UsageError
from qopt.files import write_atomic
from qopt.plan import Plan
from qopt.search.evaluation import Evaluation

NAME: Final = ".journal.partial.jsonl"
"""The journal in the output folder while a run goes on; the finished folder holds `journal.jsonl` instead."""

FORMAT: Final = 1


@final
class Journal:
    """Plans with what was measured of them, in the order in which they were; one JSON line each where a file is kept.

    The first line tells what run they belong to. A line that a killed writer left unfinished, and whatever follows it,
    is as if it had never been written.

    Args:
        path: the file, written with the first plan; None keeps nothing on disk.
        resume: take over what an interrupted run left in the file; otherwise that is written over.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False) -> None:
        self.path, self.resume = path, resume
        self._identity: dict[str, Any] = {"journal": FORMAT}
        self._records: dict[str, tuple[Plan, Evaluation]] = {}
        self._proposed: Plan | None = None
        self._whole: int | None = None

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin a run, with what its measurements depend on, by words for messages.

        Raises:
            UsageError: the file to take over cannot be read, or is of a run with another identity.
        """
        self._identity = json.loads(json.dumps({"journal": FORMAT, **identity}))
        if self.path is not None and self.resume:
            self._take_over(self.path)

    def measured(self, plan: Plan) -> Evaluation | None:
        """What was measured of a plan; None where it was not."""
        found = self._records.get(plan.digest)
        return None if found is None else found[1]

    def append(self, plan: Plan, evaluation: Evaluation) -> None:
        """Enter a plan; it is on disk when this returns. Raises UsageError where it cannot be written."""
        if plan.digest in self._records:
            return
        self._records[plan.digest] = (plan, evaluation)
        if self.path is not None:
            try:
                self._write(self.path, _line(plan, evaluation))
            except OSError as error:
                raise _unwritable(self.path, error) from error

    def propose(self, plan: Plan) -> None:
        """What to write where the user stops the run: better than every plan that was measured, as far as is known."""
        self._proposed = plan

    @property
    def best(self) -> Plan | None:
        """The plan that was proposed last, else the measured one of lowest total divergence; None before the first."""
        if self._proposed is not None or not self._records:
            return self._proposed
        return min(self._records.values(), key=lambda record: record[1].total)[0]

    @property
    def records(self) -> list[tuple[Plan, Evaluation]]:
        """All plans with what was measured of them, in the order in which they were."""
        return list(self._records.values())

    @property
    def text(self) -> str:
        """One line per measured plan."""
        return "".join(_line(*record) for record in self._records.values())

    def discard(self) -> None:
        """Remove the file: the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _take_over(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError("cannot read the journal", where=str(path), got=error.strerror or str(error)) from error
        head, *lines = content.split(b"\n")[:-1] or [b""]
        if (identity := _parsed(head)) is None:
            return
        self._check(path, identity)
        self._whole = len(head) + 1
        for line in lines:
            record = _record(line)
            if record is None:
                break
            self._records[record[0].digest] = record
            self._whole += len(line) + 1

    def _check(self, path: Path, theirs: Mapping[str, Any]) -> None:
        for word in dict.fromkeys([*self._identity, *theirs]):
            ours, other = self._identity.get(word), theirs.get(word)
            if ours != other:
                raise UsageError(
                    f"cannot resume: the journal is of a run with another {word}", where=str(path),
                    expected=_short(ours), got=_short(other),
                    fix="repeat the interrupted command, or start anew without --resume",
                )  # fmt: skip

    def _write(self, path: Path, line: str) -> None:
        if self._whole is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            first = (json.dumps(self._identity) + "\n").encode()
            write_atomic(path, first)
            _flush_folder(path.parent)
            self._whole = len(first)
        with path.open("r+b") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line.encode())


@contextmanager
def kept_plan(journal: Journal, folder: Path | None) -> Iterator[None]:
    """On Ctrl-C write the best plan so far into ``folder``; the interrupt goes on, with words where the plan is.

    It is `plan.json`, or `interrupted.plan.json` beside the output of another run, which stays whole.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        plan = journal.best
        if folder is None or plan is None:
            raise
        path = folder / ("interrupted.plan.json" if (folder / "manifest.json").exists() else "plan.json")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, plan.to_json().encode())
        except OSError as error:
            raise _unwritable(path, error) from stop
        raise KeyboardInterrupt(f"the best plan so far is {path}") from stop


def _line(plan: Plan, evaluation: Evaluation) -> str:
    content = plan.model_dump(by_alias=True, exclude={"reasons"})
    return json.dumps({"digest": plan.digest, **asdict(evaluation), "plan": content}) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None where it holds none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _record(line: bytes) -> tuple[Plan, Evaluation] | None:
    """The plan in a line and what was measured of it; None where it holds none."""
    try:
        found = json.loads(line)
        found.pop("digest")
        return Plan.from_json(json.dumps(found.pop("plan"))), Evaluation(**found)
    except (ValueError, LookupError, TypeError, AttributeError, PlanError):
        return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError("cannot write the journal", where=str(path), got=error.strerror or str(error))


def _flush_folder(folder: Path) -> None:
    """Make a new name in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
