"""A Sphinx extension: parts of pages that are written from the program, so that they cannot go stale.

A line ``<!-- generated: NAME -->`` in a page is replaced, when the page is read, by what the function of that name
below returns as Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def commands() -> str:
    """Every command of the command line with its options."""
    import typer

    from qopt.cli import app

    root: Any = typer.main.get_command(app)
    return "\n".join(["## Before any command\n", *_options(root), *_commands(root, "qopt")])


def schemas() -> str:
    """The JSON Schemas with what each describes."""
    from qopt.report.schemas import DOCUMENTS

    rows = ["| document | schema | keys |", "|---|---|---|"]
    for name in DOCUMENTS:
        file = f"{name}.schema.json"
        keys = json.loads((DOCS / "schemas" / file).read_text(encoding="utf-8"))["properties"]
        rows.append(f"| {name} | [{file}](../schemas/{file}) | {', '.join(f'`{key}`' for key in keys)} |")
    return "\n".join(rows)


def plugins() -> str:
    """What is built in of everything that can be plugged in."""
    from qopt.plugins import BUILT_IN

    rows = ["| group | built in |", "|---|---|"]
    rows += [f"| `{group}` | {', '.join(f'`{name}`' for name in table)} |" for group, table in BUILT_IN.items()]
    return "\n".join(rows)


def targets() -> str:
    """The targets with the limits that they bring."""
    from qopt.hardware.listing import cost_models, precisions

    rows = ["| target | weights | limits | prices |", "|---|---|---|---|"]
    rows += [f"| `{row['name']}` | {', '.join(row['weights'])} | {_listed(row['limits'])} | |" for row in precisions()]
    for row in cost_models():
        if row.get("origin") == "qopt":
            prices = ", ".join(dict.fromkeys([*row["prices"], *row["totals"]]))
            rows.append(f"| `{row['name']}` | what it takes | {_listed(row['limits'])} | {prices} |")
    return "\n".join(rows)


def figures() -> str:
    """Every table under `benchmarks/results`, with the program that wrote it."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        program = next(
            word for word in (path.stem, path.stem.split("_")[0]) if (ROOT / "benchmarks" / f"{word}.py").exists()
        )
        parts.append(
            f"```{{include}} ../../benchmarks/results/{path.name}\n:heading-offset: 1\n```\n\n"
            f"Written by `benchmarks/{program}.py` to `benchmarks/results/{path.name}`.\n"
        )
    return "\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands, "schemas": schemas, "plugins": plugins, "targets": targets, "figures": figures,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its marks replaced; raises KeyError for an unknown name."""
    return MARK.sub(lambda match: GENERATED[match[1]](), text)


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""

    def read(_: Any, __: str, source: list[str]) -> None:
        source[0] = filled(source[0])

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _commands(group: Any, words: str) -> Iterator[str]:
    for name, command in group.commands.items():
        full = f"{words} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command, full)
            continue
        yield f"## {full}\n"
        yield f"```text\n{full} {' '.join(_argument(one) for one in command.params if _is_argument(one))}\n```\n"
        yield f"{_plain(command.help or '')}\n"
        yield from _options(command)
        if command.epilog:
            lines = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("qopt ")]
            yield "```console\n" + "\n".join(lines) + "\n```\n"


def _options(command: Any) -> Iterator[str]:
    yield "| option | meaning | default |"
    yield "|---|---|---|"
    for one in command.params:
        if one.name == "help":
            continue
        names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
        if _is_argument(one):
            names = f"`{_argument(one)}`"
        yield f"| {names} | {_cell(one.help or '')} | {_default(one)} |"
    yield ""


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name).upper()
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default in (None, "", (), []) or callable(parameter.default):
        return ""
    if isinstance(parameter.default, bool):
        return "on" if parameter.default else "off"
    return f"`{parameter.default}`"


def _listed(limits: list[str]) -> str:
    return ", ".join(f"`{limit}`" for limit in limits) or "none"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("*", "\\*")


def _plain(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
