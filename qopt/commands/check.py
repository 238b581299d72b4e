"""`qopt check`: whether an output folder is what its report says, on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qopt.commands.running import working
from qopt.errors import UsageError

EXAMPLES = """
Examples:

    qopt check out

    qopt check out --data images.npz --images 2000
"""


def check(
    folder: Annotated[Path, typer.Argument(help="What qopt optimize wrote.")],
    data: Annotated[str | None, typer.Option(help="Images, as of qopt optimize, to measure accuracy on.")] = None,
    images: Annotated[int, typer.Option(help="Report images that are looked at, at most.")] = 500,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of internal errors.")] = False,
) -> None:
    """Verify FOLDER again: hashes, plan, kernels, norms of the shipped weights and, with images, accuracy.

    Exit code 0 where everything that could be checked holds, 1 where something does not, 2 where there is no such
    folder.
    """
    del debug  # read by main, which must know it even when parsing fails
    if images < 1:
        raise UsageError("must be at least 1", where="--images", got=str(images))
    with working(quiet, threads) as progress:
        from qopt.data import load_data
        from qopt.job.check import check_folder, exit_code

        progress("check")
        rows = check_folder(folder, None if data is None else load_data(data), sample=images)
    code = exit_code(rows)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "holds": code == 0, "checks": [asdict(row) for row in rows]}))
    else:
        words = {True: "holds", False: "FAILS", None: "left out"}
        for row in rows:
            typer.echo(f"{row.name:9} {words[row.holds]:8}  {row.text}")
    raise typer.Exit(code)
