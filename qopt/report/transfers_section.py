"""The networks of the table against each other: transfers of examples, and agreement of gradients."""

from __future__ import annotations

import string
from typing import Final

from qopt.report.heatmap import HeatMap
from qopt.report.model import Report
from qopt.report.numbers import short_name
from qopt.report.tables import Section, matrix_table

TITLE: Final = "Transfers and gradients"


def transfers(report: Report) -> Section:
    """Two heat maps with their tables; empty where nothing was attacked."""
    found = report.transfers
    if found is None:
        return Section(TITLE)
    keys = _keys(len(found.networks))
    names = tuple(f"{key} {short_name(name)}" for key, name in zip(keys, found.networks, strict=True))
    rows, fooled = ("clean images", *names), (tuple(found.clean), *map(tuple, found.fooled))
    cosines = tuple(map(tuple, found.cosines))
    maps = (
        HeatMap("Fooled, in percent", rows, keys, fooled, digits=0),
        HeatMap("Cosine between gradients", names, keys, cosines, largest=1.0, digits=2, unit=""),
    )
    notes = (
        "Fooled: share of the PGD examples made on the network of the row that the file of the column gets wrong. "
        "Images that the former gets wrong from the start are left as they are.",
        "Cosine: mean, -1 to 1, between the gradients of two networks' losses on clean images; on the diagonal the "
        f"share of images with a usable gradient. Both on the same {found.images} images.",
    )
    tables = (
        (maps[0].title, matrix_table(rows, keys, fooled, 0)),
        (maps[1].title, matrix_table(names, keys, cosines, 2)),
    )
    return Section(TITLE, notes, tables, maps, mapped=len(tables))


def _keys(count: int) -> tuple[str, ...]:
    letters = string.ascii_uppercase
    return tuple(f"{letters[i % len(letters)]}{i // len(letters) or ''}" for i in range(count))
