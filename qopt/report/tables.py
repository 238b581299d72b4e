"""Tables and the text around them, once for Markdown, for terminals and for HTML pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Protocol, final

from qopt.columns import columns
from qopt.report.charts import STYLE as CHART_STYLE
from qopt.report.heatmap import STYLE as MAP_STYLE
from qopt.report.heatmap import number

PAGE: Final = """:root { --first: #1d5fbf; --second: #b8500a; --third: #2e7d4f; --good: #1b7a3d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --first: #6aa9ff; --second: #ff9d52; --third: #6fcf97; --good: #66d08b; --bad: #ff8a80; }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
p, ul { max-width: 50rem; margin: .3rem 0 .8rem; overflow-wrap: anywhere; } ul { padding-left: 1.2rem; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--line); padding: .2rem 0 .2rem .9rem; }
.verdict.good, .verdict.bad { color: var(--ink); font-weight: 400; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.maps { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 2.5rem; }
.maps svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; } td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
.long { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
@media (max-width: 44rem) {
  body { margin: 1rem auto; padding: 0 1.3rem; } th, td { white-space: normal; }
  td:first-child { min-width: 5.5rem; overflow-wrap: break-word; } .long { min-width: 11rem; }
}
@media print {
  body { max-width: none; margin: 0; } .wide { overflow: visible; } section, svg, tr { break-inside: avoid; }
  th, td { white-space: normal; }
}
"""
"""Colours and spaces of a page, beside those of its pictures."""


LONG: Final = 48
"""Characters of a cell from which on it may take several lines."""


class Picture(Protocol):
    """What a page can show: a `HeatMap` or a chart."""

    def svg(self) -> str:
        """One ``svg`` element of its own size."""
        ...


@final
@dataclass(frozen=True)
class Table:
    """Rows of text under a header; all rows are of its length, the first column is set to the left.

    Attributes:
        header: the names of the columns.
        rows: their cells.
        left: further columns set to the left, by number; all others are set to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = ()

    def markdown(self) -> str:
        """In GitHub's flavour."""
        rule = "|" + "".join("---|" if self._is_left(i) else "---:|" for i in range(len(self.header)))
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (self.header, *self.rows)]
        return "\n".join([lines[0], rule, *lines[1:]])

    def text(self) -> str:
        """In columns two spaces apart, indented."""
        right = tuple(i for i in range(len(self.header)) if not self._is_left(i))
        rows = [tuple(" ".join(cell.split()) for cell in row) for row in (self.header, *self.rows)]
        return columns(rows, indent=2, right=right)

    def html(self) -> str:
        """A ``table`` element; numbers have the class ``number``."""
        head = "".join(f"<th{self._class(i)}>{escape(name)}</th>" for i, name in enumerate(self.header))
        body = "\n".join(
            "<tr>" + "".join(f"<td{self._class(i, cell)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _is_left(self, column: int) -> bool:
        return column == 0 or column in self.left

    def _class(self, column: int, cell: str = "") -> str:
        if len(cell) > LONG:
            return ' class="long"'
        return "" if self._is_left(column) else ' class="number"'


def matrix_table(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], digits: int
) -> Table:
    """The numbers of a heat map, each with so many decimal places; ``-`` where there is none."""
    cells = (tuple("-" if value is None else number(value, digits) for value in row) for row in values)
    return Table(("", *columns), tuple((name, *row) for name, row in zip(rows, cells, strict=True)))


@final
@dataclass(frozen=True)
class Section:
    """A part of a report: a title, sentences on how to read it, tables with captions, and pictures of the tables.

    Attributes:
        title: a few words.
        notes: sentences.
        tables: caption, or nothing, and table.
        maps: pictures, which a page shows in place of the tables that ``mapped`` counts.
        mapped: how many of the tables, from the first on, have their pictures.
        detail: whether a terminal leaves it out.
        items: the lines of a list, below all else.
    """

    title: str
    notes: tuple[str, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    maps: tuple[Picture, ...] = ()
    mapped: int = 0
    detail: bool = False
    items: tuple[str, ...] = ()

    @property
    def filled(self) -> bool:
        """Whether there is anything under the title."""
        return bool(self.notes or self.maps or self.items or any(table.rows for _, table in self.tables))

    @property
    def pictured(self) -> bool:
        """Whether pictures are all that it shows."""
        return bool(self.maps) and not self.tables

    def markdown(self) -> str:
        """Headed by ``##``, captions by ``###``."""
        parts = [f"## {self.title}", " ".join(map(_cell, self.notes))]
        parts += [
            f"### {caption}\n\n{table.markdown()}" if caption else table.markdown()
            for caption, table in self.tables
            if table.rows
        ]
        parts.append("\n".join(f"- {' '.join(item.split())}" for item in self.items))
        return "\n\n".join(part for part in parts if part)

    def text(self) -> str:
        """For terminals of any width; lines of tables are never broken."""
        parts = [f"{self.title}\n{'-' * len(self.title)}", *self.notes]
        parts += [f"{caption}\n{table.text()}" if caption else table.text() for caption, table in self.tables]
        parts += [f"- {item}" for item in self.items]
        return "\n\n".join(parts)

    def html(self) -> str:
        """A ``section`` element with the pictures in place."""
        pictures = "\n".join(picture.svg() for picture in self.maps)
        parts = [f"<h2>{escape(self.title)}</h2>", *(f"<p>{escape(note)}</p>" for note in self.notes)]
        parts += [f'<div class="maps">\n{pictures}\n</div>'] if pictures else []
        for caption, table in self.tables[self.mapped :]:
            parts += [f"<h3>{escape(caption)}</h3>"] if caption else []
            parts += [f'<div class="wide">{table.html()}</div>'] if table.rows else []
        items = "\n".join(f"<li>{escape(item)}</li>" for item in self.items)
        parts += [f"<ul>\n{items}\n</ul>"] if items else []
        return "<section>\n" + "\n".join(parts) + "\n</section>"


def page(title: str, sections: Sequence[Section], verdict: str = "") -> str:
    """A whole HTML page that needs no other file; ``verdict`` is an element under the title."""
    style = MAP_STYLE + CHART_STYLE + PAGE
    body = "\n".join(section.html() for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{verdict}"
        f"{body}\n</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    """One line without a column's end in it, whatever a user's file is called."""
    return " ".join(text.split()).replace("|", "\\|")
