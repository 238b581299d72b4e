"""Errors along the network: how the attack and how quantization grow from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from qopt.report.charts import Curves, Tone
from qopt.report.model import ErrorAmplification, LayerErrors, Report
from qopt.report.tables import Section, Table

TITLE: Final = "Error amplification"


@final
@dataclass(frozen=True)
class Column:
    """One kind of error: its field in `LayerErrors`, how tables and legends call it, and its line."""

    field: str
    name: str
    tone: Tone


ATTACK: Final = (Column("attack_float", "attack, float", "quiet"), Column("attack", "attack, qopt", "first"))
ERROR: Final = (Column("clean", "error, clean", "second"), Column("attacked", "error, attacked", "third"))


def error_amplification(report: Report) -> Section:
    """The relative errors of all layers; empty where nothing was measured on images."""
    found = report.amplification
    if found is None or not found.layers:
        return Section(TITLE)
    groups = {"What the attack changes": ATTACK, "What quantization changes": ERROR}
    shown = {title: [c for c in columns if any(_value(row, c) is not None for row in found.layers)]
             for title, columns in groups.items()}  # fmt: skip
    columns = [column for group in shown.values() for column in group]
    rows = tuple(
        (row.layer, str(number), *(_cell(_value(row, column)) for column in columns))
        for number, row in enumerate(found.layers, 1)
    )
    notes = [
        "How far a layer's output is from what it should be, as a share of its size: the mean of ||A - A'|| / ||A|| "
        f"over {found.images} images. Error: A is float's, A' that of the quantized network on the same image."
    ]
    if shown["What the attack changes"]:
        notes.append(
            "Attack: A is of a clean image, A' of the adversarial one made from it on float; both networks look at the "
            "same. Where qopt is above float, quantization amplifies the attack."
        )
    charts = tuple(_chart(title, group, found) for title, group in shown.items() if group)
    table = Table(("layer", "no.", *(column.name for column in columns)), rows)
    return Section(TITLE, tuple(notes), (("", table),), charts)


def _chart(title: str, columns: list[Column], found: ErrorAmplification) -> Curves:
    lines = []
    for column in columns:
        values = ((float(number), _value(row, column)) for number, row in enumerate(found.layers, 1))
        points = tuple((number, value) for number, value in values if value is not None)
        lines.append((column.name, column.tone, points))
    largest = max(value for _, _, points in lines for _, value in points)
    return Curves(
        title,
        "layer, from input to output",
        "relative distance",
        tuple(lines),
        largest or 1.0,
        counted=True,
        form=".3g",
    )


def _value(row: LayerErrors, column: Column) -> float | None:
    value: float | None = getattr(row, column.field)
    return value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
