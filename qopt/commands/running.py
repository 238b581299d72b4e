"""What the commands that run the main job have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qopt.errors import InterruptedRunError, UsageError


def run_job(model: str, quiet: bool, threads: int | None, **arguments: Any) -> Any:
    """The bundle that `qopt.optimize` returns; progress goes to stderr.

    Raises:
        InterruptedRunError: Ctrl-C; the best plan so far was written, if there was one.
        QoptError: as `qopt.optimize` raises it.
    """
    with working(quiet, threads) as progress:
        from qopt.api import optimize as compile_model

        return compile_model(model, progress=progress, **arguments)


def run_preview(model: str, quiet: bool, threads: int | None, **arguments: Any) -> Any:
    """The preview that `qopt.preview` returns; progress and errors as of `run_job`."""
    with working(quiet, threads) as progress:
        from qopt.api import preview

        return preview(model, progress=progress, **arguments)


def where_time_went(manifest: Mapping[str, Any]) -> str:
    """Seconds by step and by pass of the emitted plan, and what the cache held, one line each."""
    lines = [f"{seconds:8.1f} s  {step}" for step, seconds in manifest["seconds"].items()]
    lines += [f"{seconds:8.1f} s  pass {name}" for name, seconds in manifest["passes"].items()]
    hits = manifest["cache_hits"]
    return "\n".join([*lines, f"from the cache: {', '.join(hits) or 'nothing'}"]) + "\n"


@contextmanager
def working(quiet: bool, threads: int | None, fix: str | None = None) -> Iterator[Callable[[str], None]]:
    """Around the work of a command: what it is told goes to stderr, nothing of libraries to stdout; CPU threads.

    Raises:
        InterruptedRunError: Ctrl-C; it says what was written, by default nothing, and ``fix`` how to go on.
        UsageError: less than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError("must be at least 1", where="--threads", got=str(threads))
    from qopt.progress import reporter
    from qopt.quiet import stdout_to_stderr

    try:
        with reporter(quiet) as progress, stdout_to_stderr():
            progress("load")
            import torch

            if threads is not None:
                torch.set_num_threads(threads)
            yield progress
    except KeyboardInterrupt as stop:  # the command framework would end without a word
        left = str(stop)
        fix = fix or ("--resume goes on from there" if left else None)
        raise InterruptedRunError(f"interrupted, {left or 'nothing was written'}", fix=fix) from None


def finish(bundle: Any, folder: Path, as_json: bool) -> None:
    """Show the bundle that was written, and end with its exit code."""
    from qopt.terminal import show

    typer.echo(bundle.report.to_json(), nl=False) if as_json else show(bundle, folder)
    raise typer.Exit(bundle.exit_code)


def numbers(text: str, where: str) -> tuple[float, ...]:
    """The numbers of a list with commas; UsageError naming the option ``where`` it was given."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError("not a list of numbers", where=where, expected="like 0.5,0.5,0.5", got=repr(text)) from error


def image_shape(text: str) -> tuple[int, ...] | None:
    """The sizes in ``--input-shape``; None where it was left out."""
    return tuple(int(size) for size in numbers(text, "--input-shape")) or None


def sizes(words: list[str]) -> dict[str, int]:
    """The entries of ``NAME=SIZE`` words; UsageError for any other."""
    found = {}
    for word in words:
        name, _, size = word.rpartition("=")
        if not name or not size.isdigit() or not int(size):
            raise UsageError("not the size of an axis", where="--axis", expected="NAME=SIZE, such as T=16", got=word)
        found[name] = int(size)
    return found


def check_options(options: dict[str, Any]) -> None:
    """Refuse wrong words at once, before the seconds that importing torch takes."""
    from qopt.config import resolve_options
    from qopt.hardware.targets import parse_target
    from qopt.plugins import plugins as table

    resolved = resolve_options(**options)
    parse_target(resolved.target)
    if resolved.search not in table("qopt.searches"):
        from qopt.errors import nearest

        known = nearest(resolved.search, table("qopt.searches"))
        raise UsageError("unknown name", where="--search", got=repr(resolved.search), fix=known)


def check_folder(folder: Path) -> None:
    """Refuse a file as the output folder before anything is computed."""
    if folder.exists() and not folder.is_dir():
        raise UsageError("the output folder is a file", where=str(folder), fix="choose another with -o")


def cache_folder() -> Path:
    """Where expensive evaluations are kept by content."""
    from qopt.cache import default_folder

    return default_folder()
