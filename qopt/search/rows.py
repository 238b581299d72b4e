"""Formats per output channel: the knapsack of the layers, solved over their rows.

Thousands of rows make each of them small beside the budget, so that the walks along the convex hulls end within a row
of the linear relaxation and need no exchanges behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError, PlanError
from qopt.search.greedy import lower_bound, walk_down, walk_up
from qopt.search.items import Item, build_items, keeps_limits, share, total
from qopt.search.space import Outcome, Space
from qopt.size import order_width
from qopt.spec import WeightSpec

PADDING = 3
"""Bytes that the codes of one format in one layer may need beyond their share, to fill the last group."""


@final
@dataclass(frozen=True, eq=False)
class RowChoices:
    """The formats that the rows of one layer choose from.

    Attributes:
        specs: the formats.
        costs: column of `qopt.search.space.costs` to what one row takes in each format: float64 (formats,).
        divergences: what each format does to each row, float64 (formats, channels), in the unit of the candidates'
            sensitivities.
        whole: whether all rows must have the same format.
    """

    specs: tuple[WeightSpec, ...]
    costs: Mapping[str, NDArray[np.float64]]
    divergences: NDArray[np.float64]
    whole: bool = False


def row_capable(spec: WeightSpec) -> bool:
    """Whether a single row can have the format."""
    try:
        WeightSpec.of_rows([spec, WeightSpec("int", 8), spec])
    except PlanError:
        return False
    return True


def allocate_rows(space: Space, rows: Mapping[str, RowChoices]) -> Outcome:
    """The formats of all rows that lower the summed divergence most within the limits.

    Layers that ``rows`` does not name, and tied ones, get one of their candidates as a whole.

    Raises:
        InfeasibleError: no combination keeps the limits.
    """
    items: list[Item] = []
    for item in build_items(space):
        choices = rows.get(item.layers[0]) if len(item.layers) == 1 else None
        items += [item] if choices is None else _rows(space, item.layers, choices)
    walks = [picks for picks in (walk_up(items), walk_down(items)) if keeps_limits(items, picks)]
    if not walks:
        raise InfeasibleError("no combination of formats of rows keeps the limits")
    picks = min(walks, key=lambda p: total(items, p))
    value = total(items, picks)
    gap = max(value - lower_bound(items), 0.0) / abs(value) if value else 0.0
    chosen: dict[str, list[WeightSpec]] = {}
    for item, pick in zip(items, picks, strict=True):
        for layer in item.layers:
            chosen.setdefault(layer, []).append(item.specs[pick])
    specs = {layer.layer: _joined(chosen[layer.layer]) for layer in space.layers}
    reasons = {layer: _reason(spec) for layer, spec in specs.items()}
    note = f"no formats of rows within the limits lower the summed sensitivity by more than {100 * gap:.2f} %"
    return Outcome(specs, reasons, (note,), gap)


def _rows(space: Space, layer: tuple[str, ...], choices: RowChoices) -> list[Item]:
    """One item per row, or one for all: costs as shares of the budgets, order of the rows and padding included."""
    channels = choices.divergences.shape[1]
    extra = {"bytes": 0.0 if choices.whole else order_width(channels) + PADDING * len(choices.specs) / channels}
    none = np.zeros(len(choices.specs))
    shares = [
        share(choices.costs[row.column] + extra.get(row.column, 0.0), row.room) if row.counts(layer[0]) else none
        for row in space.rows()
    ]  # fmt: skip
    price = np.stack(shares, axis=1) if shares else np.zeros((len(choices.specs), 1))
    if choices.whole:
        return [Item(layer, choices.specs, channels * price, choices.divergences.sum(axis=1))]
    return [Item(layer, choices.specs, price, row) for row in choices.divergences.T]


def _joined(specs: list[WeightSpec]) -> WeightSpec:
    return specs[0] if len(specs) == 1 else WeightSpec.of_rows(specs)


def _reason(spec: WeightSpec) -> str:
    if not spec.rows:
        return "best in one format"
    return "rows by divergence: " + ", ".join(f"{count} in {row}" for row, count in sorted(spec.row_counts.items()))
