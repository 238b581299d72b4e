"""Rows of the comparison as Markdown, the best of each column marked, and the page that holds the tables again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qopt.statistics import PairedDifference

HEADER = (
    "made by", "code bits", "stored bits", "KB", "of float", "latency", "integer kernels", "clean %", "PGD-50 %",
    "robust drop", "AutoAttack %", "CPU s",
)  # fmt: skip
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


@dataclass(frozen=True)
class Row:
    """One file, measured.

    Attributes:
        name: who made it.
        code_bits, stored_bits: for each weight.
        bytes: of the file; ``ratio``: to the float file.
        latency: CPU time of one image as a share of float's.
        integer, floating: convolutions and matrix products on kernels of each kind.
        clean, steps, autoattack: accuracies in percent; the last None where it was not made.
        drop: accuracy under PGD-50 of float minus this file's, None for float itself.
        seconds: CPU time of quantizing; None for float.
        mark: a letter that a note explains, or nothing.
    """

    name: str
    code_bits: float
    stored_bits: float
    bytes: int
    ratio: float
    latency: float
    integer: int
    floating: int
    clean: float
    steps: float
    autoattack: float | None
    drop: PairedDifference | None
    seconds: float | None
    mark: str = ""

    def cells(self) -> list[str]:
        drop = "" if self.drop is None else f"{self.drop.difference:+.1f} ± {self.drop.standard_error:.1f}"
        return [
            f"{self.name} {self.mark}".strip(), f"{self.code_bits:.2f}", f"{self.stored_bits:.2f}",
            f"{self.bytes / 1000:.0f}", f"{self.ratio:.3f}", f"{self.latency:.2f}",
            f"{self.integer} of {self.integer + self.floating}", f"{self.clean:.1f}", f"{self.steps:.1f}", drop,
            "" if self.autoattack is None else f"{self.autoattack:.0f}",
            "" if self.seconds is None else f"{self.seconds:.0f}" if self.seconds >= 1 else f"{self.seconds:.1f}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """A tool that gave no file, and why."""

    name: str
    reason: str

    def cells(self) -> list[str]:
        return [self.name, self.reason, *[""] * (len(HEADER) - 2)]


BEST: dict[str, Callable[[Row], float | None]] = {
    "code bits": lambda row: -row.code_bits, "stored bits": lambda row: -row.stored_bits, "KB": lambda row: -row.bytes,
    "of float": lambda row: -row.ratio, "latency": lambda row: -row.latency,
    "integer kernels": lambda row: row.integer / (row.integer + row.floating), "clean %": lambda row: row.clean,
    "PGD-50 %": lambda row: row.steps, "robust drop": lambda row: row.drop and -row.drop.difference,
    "CPU s": lambda row: None if row.seconds is None else -row.seconds,
}  # fmt: skip
"""How good a row is in a column: the larger the better; None where the row is not judged.

AutoAttack is not among them: it sees too few images to rank files, and is there to say whether PGD-50 can be believed.
"""


def table(rows: Iterable[Row | Missing]) -> list[str]:
    """The rows, the first of which is float, as lines; the best of all others in bold, ties included."""
    every = list(rows)
    judged = [row for row in every[1:] if isinstance(row, Row)]
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    shown = {id(row): row.cells() for row in every}
    for column, worth in BEST.items():
        place = HEADER.index(column)
        found = {id(row): value for row in judged if (value := worth(row)) is not None}
        top = [row for row in judged if found.get(id(row)) == max(found.values(), default=None)]
        best = {shown[id(row)][place] for row in top}
        for row in judged:
            cells = shown[id(row)]
            if cells[place] in best and id(row) in found:  # what looks the same is the same
                cells[place] = f"**{cells[place]}**"
    return lines + ["| " + " | ".join(shown[id(row)]) + " |" for row in every]


def lowered(text: str) -> str:
    """The log's text without its title: what the page holds between its marks."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip()


def filled(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks; ValueError where it has none."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
