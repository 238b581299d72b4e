"""Aligned columns of text, for what commands print."""

from __future__ import annotations

from collections.abc import Sequence


def section(title: str, rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """The title and below it the rows, indented; empty without rows. ``right`` are columns set to the right."""
    return f"{title}\n{columns(rows, indent=2, right=right)}" if rows else ""


def columns(rows: Sequence[tuple[str, ...]], indent: int = 0, right: tuple[int, ...] = ()) -> str:
    """At least one row, all of one length, in columns two spaces apart; no space ends a line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in range(len(row))).rstrip()
        for row in rows
    )
    return "\n".join(" " * indent + line for line in lines)
