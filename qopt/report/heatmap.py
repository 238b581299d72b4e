"""Heat maps as SVG: the same bytes for the same numbers, with the number in every cell, in light and in dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Final, final

CELL_WIDTH: Final = 64
CELL_HEIGHT: Final = 30
GAP: Final = 2
"""Pixels between cells."""

TOP: Final = 52
"""Pixels above the cells: the title and the names of the columns."""

CHARACTER: Final = 7.2
"""Pixels of one character of a row's name at most, at 12 pixels of a usual sans-serif."""

LONGEST: Final = 32
"""Characters of a row's name that are shown."""

TURN: Final = 0.7
"""Share of the colour from which on the number is written in the page's colour: where both are read equally well."""

STYLE: Final = """:root {
  --page: #ffffff; --ink: #15181c; --faint: #6a7280; --line: #d4d8de;
  --more: #003a96; --less: #a20c00; --cell-ink: #000000; --cell-turned: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --ink: #e6e8eb; --faint: #9aa3af; --line: #363b43;
    --more: #3fa0ff; --less: #ff7a32; --cell-ink: #ffffff; --cell-turned: #000000;
  }
}
.heat { background: var(--page); font-family: system-ui, sans-serif; font-size: 12px; }
.heat .name { fill: var(--ink); }
.heat .title { fill: var(--ink); font-weight: 600; font-size: 13px; }
.heat rect { stroke: var(--line); }
.heat .missing { fill: none; stroke-dasharray: 3 3; }
.heat .none { fill: var(--faint); }
.heat .more { fill: var(--more); }
.heat .less { fill: var(--less); }
.heat .value { fill: var(--cell-ink); font-variant-numeric: tabular-nums; }
.heat .turned { fill: var(--cell-turned); font-variant-numeric: tabular-nums; }
"""
"""The rules that heat maps need, with the colours as variables; page and heat map share them."""


@final
@dataclass(frozen=True)
class HeatMap:
    """A matrix to be drawn.

    Attributes:
        title: what it is of, a few words.
        rows: names, from the top.
        columns: short names, from the left.
        values: a number or None for each row and column.
        largest: the number, larger than 0, that gets the full colour; 0 gets none, and numbers below it the other one.
        digits: decimal places shown.
        unit: of the numbers, for the text that screen readers and pointers get.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    largest: float = 100.0
    digits: int = 1
    unit: str = " %"

    def svg(self) -> str:
        """The picture, one ``svg`` element of its own size in pixels; it looks as `STYLE` says."""
        left = 12 + round(CHARACTER * max((len(_shortened(name)) for name in self.rows), default=0))
        width = max(left + len(self.columns) * (CELL_WIDTH + GAP), 16 + round(7.8 * len(self.title)))
        height = TOP + len(self.rows) * (CELL_HEIGHT + GAP) + 6
        parts = [
            f'<svg class="heat" xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{plain(self._summary())}">',
            f'<text class="title" x="4" y="18">{plain(self.title)}</text>',
            *(self._column(name, left + i * (CELL_WIDTH + GAP)) for i, name in enumerate(self.columns)),
        ]
        for number, (name, values) in enumerate(zip(self.rows, self.values, strict=True)):
            top = TOP + number * (CELL_HEIGHT + GAP)
            parts.append(
                f'<text class="name" x="{left - 8}" y="{top + 19}" text-anchor="end">'
                f"<title>{plain(name)}</title>{plain(_shortened(name))}</text>"
            )
            parts += [
                self._cell(name, column, value, left + i * (CELL_WIDTH + GAP), top)
                for i, (column, value) in enumerate(zip(self.columns, values, strict=True))
            ]
        return "\n".join([*parts, "</svg>"])

    def _summary(self) -> str:
        rows = (f"{name}: {', '.join(map(self._shown, row))}" for name, row in zip(self.rows, self.values, strict=True))
        return f"{self.title}, columns {', '.join(self.columns)}. {'; '.join(rows)}"

    def _shown(self, value: float | None) -> str:
        return "-" if value is None else number(value, self.digits)

    def _column(self, name: str, left: int) -> str:
        return f'<text class="name" x="{left + CELL_WIDTH // 2}" y="42" text-anchor="middle">{plain(name)}</text>'

    def _cell(self, row: str, column: str, value: float | None, left: int, top: int) -> str:
        place = f'x="{left}" y="{top}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" rx="3"'
        middle = f'x="{left + CELL_WIDTH // 2}" y="{top + 19}" text-anchor="middle"'
        if value is None:
            box, kind = f'<rect class="missing" {place}/>', "none"
        else:
            share = min(abs(value) / self.largest, 1.0)
            box = f'<rect class="{"less" if value < 0 else "more"}" {place} fill-opacity="{share:.3f}"/>'
            kind = "turned" if share >= TURN else "value"
        shown = self._shown(value)
        said = f"{row}, {column}: {shown if value is None else shown + self.unit}"
        return f'<g><title>{plain(said)}</title>{box}<text class="{kind}" {middle}>{shown}</text></g>'


def number(value: float, digits: int) -> str:
    """``value`` with so many decimal places, without a sign before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _shortened(name: str) -> str:
    """A long name without its middle: what tells names apart is at their ends."""
    if len(name) <= LONGEST:
        return name
    half = (LONGEST - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def plain(text: str) -> str:
    """Text for XML: escaped, and without the control characters that XML has no way to write."""
    return escape("".join(c if c.isprintable() else " " for c in text))
