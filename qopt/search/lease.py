"""Whether somebody who took a piece of work still does it: signs of life, and processes that have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Final, final

BEAT: Final = 10.0
"""Seconds between signs of life of a process that works."""

GRACE: Final = 60.0
"""Seconds without one after which a process on another machine counts as gone."""


@final
class Heartbeat:
    """Gives a sign of life every ``interval`` seconds, in a thread, for as long as the block lasts.

    ``beat`` is told how many there were and answers whether to go on; what it raises is as if it had not been called,
    for the storage may only be busy.
    """

    def __init__(self, beat: Callable[[int], bool], interval: float) -> None:
        self._beat, self._interval, self._ended = beat, interval, Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        count = 1
        while not self._ended.wait(self._interval):
            try:
                if not self._beat(count):
                    return
            except Exception:  # whatever the storage raises; the grace period forgives a few
                continue
            count += 1


@final
class Watch:
    """Sees which leases have ended, by its own clock only: those that have not changed for ``grace`` seconds.

    A process of this machine that has ended is seen at once.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._seen: dict[int, tuple[object, float]] = {}

    def has_ended(self, number: int, lease: Mapping[str, Any] | None) -> bool:
        """Whether the lease of work ``number``, as it is now, has ended."""
        if lease is not None and is_gone(str(lease.get("process", ""))):
            return True
        now, (before, since) = time.monotonic(), self._seen.get(number, (object(), 0.0))
        if before != lease:
            self._seen[number] = lease, now
            return False
        return now - since > self._grace


def this_process() -> str:
    """Words that no other process has, here or elsewhere, now or later; empty where the system does not tell."""
    machine, began = _machine(), _began(os.getpid())
    return f"{machine}/{os.getpid()}/{began}" if machine and began else ""


def is_gone(process: str) -> bool:
    """Whether it is a process of this machine that has ended; of other machines nothing is known."""
    machine, _, rest = process.partition("/")
    pid, _, began = rest.partition("/")
    return bool(machine) and machine == _machine() and pid.isdigit() and _began(int(pid)) != began


def _machine() -> str:
    """The running kernel and its process numbers, which containers have of their own; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the machine did; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
