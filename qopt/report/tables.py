"""Tables and the text around them, once for Markdown, for terminals and for HTML pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import final

from qopt.columns import columns
from qopt.report.heatmap import HeatMap


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
            "<tr>" + "".join(f"<td{self._class(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
            for row in self.rows
        )
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _is_left(self, column: int) -> bool:
        return column == 0 or column in self.left

    def _class(self, column: int) -> str:
        return "" if self._is_left(column) else ' class="number"'


@final
@dataclass(frozen=True)
class Section:
    """A part of a report: a title, sentences on how to read it, tables with captions, and pictures of the tables.

    Attributes:
        title: a few words.
        notes: sentences.
        tables: caption, or nothing, and table.
        maps: heat maps, which a page shows in place of the tables that ``mapped`` counts.
        mapped: how many of the tables, from the first on, have their heat maps.
        detail: whether a terminal leaves it out.
    """

    title: str
    notes: tuple[str, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    maps: tuple[HeatMap, ...] = ()
    mapped: int = 0
    detail: bool = False

    def markdown(self) -> str:
        """Headed by ``##``, captions by ``###``."""
        parts = [f"## {self.title}", " ".join(map(_cell, self.notes))]
        parts += [
            f"### {caption}\n\n{table.markdown()}" if caption else table.markdown() for caption, table in self.tables
        ]
        return "\n\n".join(part for part in parts if part)

    def text(self) -> str:
        """For terminals of any width; lines of tables are never broken."""
        parts = [f"{self.title}\n{'-' * len(self.title)}", *self.notes]
        parts += [f"{caption}\n{table.text()}" if caption else table.text() for caption, table in self.tables]
        return "\n\n".join(parts)

    def html(self) -> str:
        """A ``section`` element with the pictures in place."""
        pictures = "\n".join(picture.svg() for picture in self.maps)
        parts = [f"<h2>{escape(self.title)}</h2>", *(f"<p>{escape(note)}</p>" for note in self.notes)]
        parts += [f'<div class="maps">\n{pictures}\n</div>'] if pictures else []
        for caption, table in self.tables[self.mapped :]:
            parts += [f"<h3>{escape(caption)}</h3>"] if caption else []
            parts.append(f'<div class="wide">{table.html()}</div>')
        return "<section>\n" + "\n".join(parts) + "\n</section>"


def page(title: str, style: str, sections: Sequence[Section]) -> str:
    """A whole HTML page that needs no other file."""
    body = "\n".join(section.html() for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    """One line without a column's end in it, whatever a user's file is called."""
    return " ".join(text.split()).replace("|", "\\|")
