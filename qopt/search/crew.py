"""What the processes at one queue do: take a piece, do it, enter what came of it, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Final, Protocol

from qopt.errors import QoptError
from qopt.search.pieces import Piece, Result

if TYPE_CHECKING:
    from qopt.search.queue import Queue

ASK: Final = 1.0
"""Seconds, at least, between the questions of a worker whether the run has ended."""

POLL: Final = 0.3
"""Seconds between looks at a queue that has nothing to take."""


class Workshop(Protocol):
    """What does pieces.

    Attributes:
        ready: the groups that it is prepared for.
    """

    @property
    def ready(self) -> Set[str]: ...

    def __call__(self, piece: Piece) -> Result:
        """Do a piece."""
        ...


def attend(queue: Queue, workshop: Workshop, *, anything: bool = False) -> str | None:
    """Take one piece and do it; None where there is none, else the empty text or why it failed.

    Raises:
        Exception: with ``anything``, what the work raised: there is nobody left to try it.
    """
    claim = queue.take(workshop.ready, anything=anything)
    if claim is None:
        return None
    with queue.held(claim):
        try:
            result = workshop(claim.piece)
        except Exception as error:
            text = str(error) if isinstance(error, QoptError) else f"{type(error).__name__}: {error}"
            reason = " ".join(text.split())
            queue.failed(claim, reason)
            if anything:
                raise
            return reason
        queue.done(claim, result)
    return ""


def gather(queue: Queue, keys: Sequence[str], workshop: Workshop, said: Callable[[str], None]) -> list[Result]:
    """The results of ``keys``, which were put: works on whatever there is until others have done theirs.

    ``said`` is told what failed or was lost.

    Raises:
        QoptError: a piece failed too often.
        Exception: what the work raised here.
    """
    while not queue.results().keys() >= set(keys):
        for words in queue.revive():
            said(words)
        if attend(queue, workshop, anything=True) is None:
            time.sleep(POLL)
    return [queue.results()[key] for key in keys]


def serve(queue: Queue, workshop: Workshop, idle: float | None, said: Callable[[str], None]) -> int:
    """Do pieces until the run has ended, or nothing came for ``idle`` seconds; returns how many were done."""
    done, since, asked = 0, time.monotonic(), -ASK
    while True:
        if time.monotonic() - asked >= ASK:
            if queue.finished:
                break
            asked = time.monotonic()
        outcome = attend(queue, workshop)
        if outcome is None:
            if idle is not None and time.monotonic() - since > idle:
                break
            time.sleep(POLL)
            continue
        since = time.monotonic()
        done += not outcome
        if outcome:
            said(f"failed, left to others: {outcome}")
    return done
