"""`qopt targets`: what a network can be compiled for, what each machine takes and costs, and why to believe it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from qopt.errors import UsageError

EXAMPLES = """
Examples:

    qopt targets

    qopt targets stm32f4 --json
"""


def targets(
    name: Annotated[str | None, typer.Argument(help="One target, such as stm32f4. [all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """List the targets: formats and limits, and of every cost model the source of each constant.

    Names join by commas behind `--target`: formats intersect, limits add up. Exit code 0, 2 for an unknown name.
    """
    from qopt.hardware.listing import cost_models, precisions

    found: dict[str, list[dict[str, Any]]] = {"precisions": precisions(), "cost_models": cost_models()}
    if name is not None:
        known = [row["name"] for rows in found.values() for row in rows]
        if name not in known:
            from qopt.errors import nearest

            raise UsageError("unknown target", got=repr(name), fix=nearest(name, known))
        found = {kind: [row for row in rows if row["name"] == name] for kind, rows in found.items()}
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for row in found["precisions"]:
        yield f"{row['name']}: weights {', '.join(row['weights'])}; activations {row['activations']}"
        yield f"  limits: {', '.join(row['limits'])}"
    for row in found["cost_models"]:
        yield from _model(row)


def _model(row: dict[str, Any]) -> Iterator[str]:
    if "error" in row:
        yield f"{row['name']} ({row['origin']}): {row['error']}"
        return
    priced = {**row["prices"], **row["totals"]}
    yield f"{row['name']} ({row['origin']}): prices {', '.join(f'{what} [{unit}]' for what, unit in priced.items())}"
    yield f"  limits: {', '.join(row['limits']) or 'none'}"
    yield f"  bits of activations: {', '.join(map(str, row['activation_bits']))}"
    for layer, formats in row["takes"].items():
        yield f"  {layer}: {', '.join(formats) or 'nothing'}"
    for what, one in row["constants"].items():
        yield f"  {what} = {one['value']:g} {one['unit']}, {one['basis']}: {one['source']}"
