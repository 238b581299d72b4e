"""`qopt plugins`: what is installed, and what is wrong with it."""

from __future__ import annotations

from typing import Annotated

import typer

from qopt.errors import UsageError

EXAMPLES = """
Examples:

    qopt plugins

    qopt plugins qopt.cost_models
"""


def plugins(
    group: Annotated[str | None, typer.Argument(help="One group, such as qopt.searches. [all]")] = None,
) -> None:
    """List every plugin with its origin, and why it does not load where it does not."""
    from qopt.plugins import BUILT_IN, checked
    from qopt.plugins import plugins as table

    if group is not None and group not in BUILT_IN:
        from qopt.errors import nearest

        raise UsageError("unknown plugin group", got=repr(group), fix=nearest(group, BUILT_IN))
    for name in [group] if group else sorted(BUILT_IN):
        typer.echo(name)
        for plugin in map(checked, table(name).values()):
            typer.echo(f"  {plugin.name:<22} {plugin.origin:<20} {plugin.error or plugin.target}")
