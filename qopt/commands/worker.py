"""`qopt worker`: another machine's share of a search that measures plans."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from qopt.commands.running import cache_folder, working
from qopt.errors import UsageError

STORAGE = "URL of a database, such as postgresql://USER@HOST/DATABASE, or journal:FILE on one machine."
EXAMPLES = """
Examples:

    qopt optimize model.onnx --data images.npz --search refit --storage postgresql://qopt@server/qopt --study lenet

    qopt worker --storage postgresql://qopt@server/qopt --study lenet

    qopt worker --storage journal:runs.log --study lenet --idle 60 --threads 1
"""


def worker(
    storage: Annotated[str, typer.Option(help=STORAGE)],
    study: Annotated[str, typer.Option(help="The study that `qopt optimize` named.")],
    model: Annotated[str | None, typer.Option(help="The model's file here. [as of the run]")] = None,
    data: Annotated[
        str | None, typer.Option(help="The images here, or package.module:factory. [as of the run]")
    ] = None,
    factory: Annotated[str | None, typer.Option(help="package.module:factory of a state dict.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load formats that can run code.")] = False,
    idle: Annotated[
        float | None, typer.Option(help="End after so many seconds without work. [when the run ends]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    cache: Annotated[bool, typer.Option(help="Keep expensive evaluations by content.")] = True,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Measure plans for a `qopt optimize` with the same --storage and --study, until it ends."""
    del debug  # read by main, which must know it even when parsing fails
    if idle is not None and not idle >= 0:
        raise UsageError("must be 0 or more seconds", where="--idle", got=str(idle))
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # what launchers send: gives its work back, as Ctrl-C does
    with working(quiet, threads, fix="start it again to go on") as progress:
        from qopt.cache import Cache
        from qopt.job.worker import Own, work

        own = Own(model, data, factory, trust)
        count = work(storage, study, own, Cache(cache_folder() if cache else None), progress, idle=idle)
    typer.echo(f"{count} parts of plans measured")
