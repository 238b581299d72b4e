"""C source text: names, comments, constant arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UsageError

LINE = 110
"""Columns of a generated line, about."""

_TYPES: Final = {"int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t"}


def check_name(name: str) -> None:
    """Raise UsageError where ``name`` is no C identifier in lower case, with which all names of a program begin."""
    if re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) is None:
        raise UsageError(
            "not a name for C code", expected="a letter, then at most 30 letters, digits or _, all lower case", got=name
        )


def identifier(text: str) -> str:
    """``text`` as a part of an identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()[:40] or "unnamed"


def comment(text: str) -> str:
    """``text`` as what may stand in a comment: no ends of comments, line splices, trigraphs or letters beyond ASCII."""
    plain = text.encode("ascii", "replace").decode()
    return re.sub(r"\?(?=\?)|[^ -~\n]|\\", "_", plain.replace("*/", "*_").replace("/*", "_*"))


def real(number: float) -> str:
    """A float32 number as an exact C99 constant."""
    return f"{float(np.float32(number)).hex()}f"


def numbers(values: NDArray[Any], indent: str = "    ") -> str:
    """Integers with commas between them, in lines of about `LINE` columns."""
    words = [str(int(value)) for value in values.reshape(-1)]
    lines, line = [], indent
    for word in words:
        if len(line) + len(word) + 2 > LINE:
            lines.append(line.rstrip())
            line = indent
        line += f"{word}, "
    return "\n".join([*lines, line.rstrip()])


def structure(fields: Mapping[str, object], indent: str = "    ") -> str:
    """Designated initializers, as many in a line as fit."""
    lines, line = [], indent
    for key, value in fields.items():
        word = f".{key} = {value}, "
        if len(line) + len(word) > LINE and line.strip():
            lines.append(line.rstrip())
            line = indent
        line += word
    return "\n".join([*lines, line.rstrip()])


@final
@dataclass
class Constants:
    """Constant arrays, each written once however many layers use it.

    Attributes:
        size: bytes of all arrays.
    """

    size: int = 0
    _names: dict[tuple[str, str], str] = field(default_factory=dict)

    def array(self, lines: list[str], name: str, values: NDArray[Any]) -> str:
        """The name of the array that holds ``values``; where there was none, its definition joins ``lines``."""
        kind = _TYPES[values.dtype.name]
        key = (kind, values.tobytes().hex())
        if key not in self._names:
            taken = self._names.values()
            name = name if name not in taken else f"{name}_{len(taken)}"
            self._names[key] = name
            self.size += values.nbytes
            lines.append(f"static const {kind} {name}[{values.size}] = {{\n{numbers(values)}\n}};")
        return self._names[key]
