"""The command line. Results go to stdout, progress and messages to stderr; nothing below this file prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qopt._version import __version__
from qopt.commands import analyze, attack, certify, check, compare, doctor, optimize, plugins, targets, worker
from qopt.commands.plan import plan
from qopt.commands.settings import defaults, find
from qopt.errors import QoptError

EXIT_CODES = """

Exit codes: 0 emitted and every gate holds, or attacked; 1 emitted but a gate failed, or attacked but gradients are
masked; 2 usage or configuration; 3 model not supported; 4 internal error; 130 interrupted.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Quantize a network, choose every layer's format under Lipschitz thresholds, and attack the file that ships.",
    epilog=EXIT_CODES.strip(),
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `qopt` command."""
    try:
        app(standalone_mode=True)
    except QoptError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split()) or "no message"
        _fail(f"internal error: {type(error).__name__}: {text}; --debug shows where", 4)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"qopt: {message}\n")
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qopt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="File of options. [qopt.toml, else [tool.qopt] in pyproject.toml, of this folder]"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a network, choose every layer's format under Lipschitz thresholds, and attack the file that ships."""
    path = config or find(Path())
    if path is not None and not context.resilient_parsing:
        group: Any = context.command
        commands = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")}
        context.default_map = defaults(path, commands, named=config is not None)


for module in (optimize, compare, attack, certify, analyze, check, doctor, plugins, targets, worker):
    app.command(epilog=module.EXAMPLES)(getattr(module, module.__name__.rpartition(".")[2]))
app.add_typer(plan, name="plan")
