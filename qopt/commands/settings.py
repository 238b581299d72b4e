"""`qopt.toml`, or `[tool.qopt]` in `pyproject.toml`: the options that the command line leaves out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from qopt.errors import UsageError, nearest

NAMES: Final = ("qopt.toml", "pyproject.toml")
"""Looked for in the working directory, in this order; the first that has options of qopt is taken."""

SPOKEN: Final = {"COMMANDLINE": "command line", "DEFAULT_MAP": "file"}
"""By the name of click's source of a value; all others are defaults."""

VOUCHED: Final = ("trust",)
"""What no file can say: whether a file may run is for whoever calls to say."""

CODE: Final = re.compile(r"[\w.]+:\w+")
"""``package.module:factory``, which is imported; a file that was merely found must not name it."""


class Option(Protocol):
    """What is needed of a parameter of click, or of the copy of it that newer versions of typer carry."""

    name: str | None
    opts: list[str]
    multiple: bool
    is_flag: bool


class Command(Protocol):
    """Likewise of a command."""

    params: list[Any]


class Context(Protocol):
    """Likewise of the context that a command runs in."""

    command: Any
    info_name: str | None
    params: dict[str, Any]

    def get_parameter_source(self, name: str) -> Any:
        """Where a value is from."""
        ...


def find(folder: Path) -> Path | None:
    """The file of options in a folder; None without one."""
    for name in NAMES:
        path = folder / name
        if path.is_file() and (name == NAMES[0] or "qopt" in _parsed(path).get("tool", {})):
            return path
    return None


def defaults(path: Path, commands: Mapping[str, Command], *, named: bool) -> dict[str, dict[str, Any]]:
    """Command to parameter to value, as click takes them for ``default_map``.

    ``named``: whether the caller named the file, and so vouches for it; one that was found names no code to run.

    Raises:
        UsageError: the file cannot be read, is no TOML, holds a table, a key or a value that no command takes, or says
            what only the caller can say.
    """
    content = _parsed(path)
    tables = content.get("tool", {}).get("qopt", {}) if path.name == "pyproject.toml" else content
    found: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        where = f"{path.name}, [{name}]"
        command = commands.get(name)
        if command is None or not isinstance(table, dict):
            got = f"the key {name!r} outside of a table" if not isinstance(table, dict) else f"[{name}]"
            fix = "put options under their command, such as [optimize]" if not isinstance(table, dict) else None
            raise UsageError(
                "no such table", where=path.name, expected=", ".join(f"[{known}]" for known in commands), got=got,
                fix=fix or nearest(name, commands),
            )  # fmt: skip
        keys = options(command)
        for key, value in table.items():
            if key not in keys:
                raise UsageError("unknown key", where=where, got=repr(key), fix=nearest(key, keys))
            if not named:
                _check_runs_nothing(key, value, f"{where}: {key}")
            found.setdefault(name, {})[str(keys[key].name)] = _checked(keys[key], value, f"{where}: {key}")
    return found


def _check_runs_nothing(key: str, value: Any, where: str) -> None:
    if isinstance(value, str) and key in ("model", "data") and CODE.fullmatch(value):
        raise UsageError(
            "a file that was found, not named, names code to run", where=where, got=repr(value),
            fix=f"give --config {where.partition(',')[0]} before the command, if you trust it",
        )  # fmt: skip


def options(command: Command) -> dict[str, Option]:
    """Key to option: the long name, without its dashes."""
    found = {max(option.opts, key=len): option for option in command.params if option.name != "help"}
    return {name.lstrip("-"): option for name, option in found.items() if name.startswith("-")}


def described(context: Context) -> str:
    """The options that a command would run with, as the text of a `qopt.toml`; comments say where each is from."""
    lines = [f"[{context.info_name}]"]
    for key, option in options(context.command).items():
        value, source = context.params.get(str(option.name)), context.get_parameter_source(str(option.name))
        if key in (*VOUCHED, "show-config", "debug") or value in (None, [], ()):
            continue
        origin = SPOKEN.get(getattr(source, "name", ""), "default")
        lines.append(f"{key} = {_written(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def _checked(option: Option, value: Any, where: str) -> Any:
    """The value, where it is of the option's kind."""
    if max(option.opts, key=len).lstrip("-") in VOUCHED:
        raise UsageError("a file cannot vouch for other files", where=where, fix="give --trust on the command line")
    if option.multiple:
        if not isinstance(value, list):
            raise UsageError("not a list", where=where, expected='such as ["..."]', got=repr(value))
        return [_one(option, one, where) for one in value]
    return _one(option, value, where)


def _one(option: Option, value: Any, where: str) -> Any:
    """A switch as it is, all else as the text that the command line would hold."""
    if isinstance(value, bool) is not option.is_flag or not isinstance(value, (str, int, float)):
        expected = "true or false" if option.is_flag else "text or a number"
        raise UsageError("wrong kind of value", where=where, expected=expected, got=repr(value))
    return value if option.is_flag else str(value)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("cannot be read", where=str(path), got=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError("not a TOML file", where=str(path), got=str(error)) from error


def _written(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(one) for one in value)}]"
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
