"""The solver's view of a search space: one decision per layer or tied group, costs as shares of the budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search.space import LayerSpace, Row, Space, costs
from qopt.spec import WeightSpec

FULL = 1 + 1e-9
"""A budget is kept up to this share of it: sums of shares are off by rounding."""

Cost = TypeVar("Cost", float, NDArray[np.float64])

BEYOND = 2.0
"""Shares of a budget that no plan can hold, whatever their size: a budget of nothing makes them huge."""


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One decision: a layer or a tied group, its formats, their costs (choices, budgets) and sensitivities.

    A budget is the room of one row of `Space.rows`, a cost a share of it; without limits there is one budget and every
    cost is zero.
    """

    layers: tuple[str, ...]
    specs: tuple[WeightSpec, ...]
    costs: NDArray[np.float64]
    sensitivities: NDArray[np.float64]

    @property
    def weight(self) -> NDArray[np.float64]:
        """Costs joined to one column: the sum of each cost's share of its budget."""
        total: NDArray[np.float64] = self.costs.sum(axis=1)
        return total


def build_items(space: Space) -> list[Item]:
    """One item per tied group or single layer; raises InfeasibleError for tied layers without a common format."""
    by_name = {layer.layer: layer for layer in space.layers}
    grouped = {name: group for group in space.ties for name in group}
    rows = space.rows()
    seen: set[str] = set()
    items = []
    for layer in space.layers:
        if layer.layer not in seen:
            members = [by_name[name] for name in grouped.get(layer.layer, (layer.layer,))]
            seen.update(member.layer for member in members)
            items.append(_item(members, rows))
    return items


def _item(members: Sequence[LayerSpace], rows: Sequence[Row]) -> Item:
    common = [
        c.spec for c in members[0].candidates if all(any(c.spec == o.spec for o in m.candidates) for m in members)
    ]
    if not common:
        raise InfeasibleError("tied layers have no format in common", where=", ".join(m.layer for m in members))
    chosen = [[member.candidate(spec) for member in members] for spec in common]
    table = [[(m.layer, costs(c)) for m, c in zip(members, candidates, strict=True)] for candidates in chosen]
    shares = [
        [share(math.fsum(cost[row.column] for name, cost in one if row.counts(name)), row.room) for row in rows]
        for one in table
    ]
    return Item(
        tuple(member.layer for member in members),
        tuple(common),
        np.array(shares, np.float64) if rows else np.zeros((len(chosen), 1)),
        np.array([sum(c.sensitivity for c in candidates) for candidates in chosen]),
    )


def share(cost: Cost, room: float) -> Cost:
    """A cost as a share of its budget; where less than nothing is left, every choice alone is more than there is."""
    return cost * 0.0 + BEYOND if room < 0 else cost / max(room, 1e-300)


def total(items: Sequence[Item], picks: Sequence[int]) -> float:
    """Summed sensitivity of a plan."""
    return sum(float(item.sensitivities[p]) for item, p in zip(items, picks, strict=True))


def spending(items: Sequence[Item], picks: Sequence[int]) -> NDArray[np.float64]:
    """Share of every budget that a plan spends: (budgets,)."""
    spent: NDArray[np.float64] = np.sum([item.costs[p] for item, p in zip(items, picks, strict=True)], axis=0)
    return spent


def keeps_limits(items: Sequence[Item], picks: Sequence[int]) -> bool:
    """Whether a plan spends no more than every budget."""
    return bool((spending(items, picks) <= FULL).all())
