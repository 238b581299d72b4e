"""A Sphinx extension: the sections of qopt's docstrings (Args, Attributes, Returns, Raises) as Sphinx has them.

Napoleon is not used: of a one-line docstring of a property, and of what is returned, it takes all words before a colon
for a type.
"""

from __future__ import annotations

import re
from typing import Any

FIELDS = {"Args:": ":param {}: {}", "Attributes:": ":ivar {}: {}", "Raises:": ":raises {}: {}"}
ITEM = re.compile(r"([\w*]+): +(.*)")


def fields(lines: list[str]) -> list[str]:
    """The lines of a docstring, without common indentation, with the sections as field lists."""
    found: list[str] = []
    section = ""
    for line in lines:
        if line in FIELDS or line == "Returns:":
            section = line
            found += [""] if section != "Returns:" else ["", ":returns:"]
        elif section and line and not line.startswith(" "):
            section = ""
            found += ["", line]
        elif section in FIELDS and (item := ITEM.match(line.strip())) and line[4:5].strip():
            found.append(FIELDS[section].format(item[1].replace("*", "\\*"), item[2]))
        elif section:
            found.append(f"    {line.strip()}" if line.strip() else "")
        else:
            found.append(line)
    return found


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""

    def process(_: Any, __: str, ___: str, ____: object, _____: object, lines: list[str]) -> None:
        lines[:] = fields(lines)

    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
