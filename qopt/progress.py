"""Progress on stderr: a live line on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reporter(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function to be told each step as it begins; the display ends with the block."""
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        began = time.perf_counter()
        yield lambda step: print(f"[{time.perf_counter() - began:6.1f} s] {step}", file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        running: list[int] = []
        topics: list[str] = []

        def begin(step: str) -> None:
            if running and _topic(step) == topics[-1]:
                bar.update(running[-1], description=step)  # type: ignore[arg-type]
                return
            topics.append(_topic(step))
            if running:
                bar.update(running[-1], total=1, completed=1)  # type: ignore[arg-type]
            running.append(bar.add_task(step, total=None))

        yield begin
        if running:
            bar.update(running[-1], total=1, completed=1)  # type: ignore[arg-type]


def _topic(step: str) -> str:
    """What comes before the colon in ``PGD-20: 100 of 200 images``: such steps share one line."""
    topic, colon, _ = step.partition(": ")
    return topic + colon
