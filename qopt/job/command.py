"""The command that runs a job again."""

from __future__ import annotations

import shlex

from qopt.config import Options

_LISTS = {"limits": "--limit", "gates": "--gate", "baselines": "--baseline"}
_NUMBERS = ("mean", "std")


def reproduce(model: str, data: str | None, options: Options, extra: tuple[str, ...] = ()) -> str:
    """A shell command equal to the call: every option that is not at its default, without the output folder."""
    words = ["qopt", "optimize", model, *(["--data", data] if data else []), *extra]
    defaults = Options()
    for name in Options.__dataclass_fields__:
        value = getattr(options, name)
        if value == getattr(defaults, name):
            continue
        words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag]
    if isinstance(value, tuple):
        if name in _NUMBERS:
            return [flag, ",".join(f"{number:g}" for number in value)]
        return [word for entry in value for word in (_LISTS[name], str(entry))]
    return [flag, f"{value:.17g}" if isinstance(value, float) else str(value)]
