"""The solver's view of a search space: one decision per layer or tied group, costs as shares of the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search.space import LayerSpace, Space, costs
from qopt.spec import WeightSpec

FULL = 1 + 1e-9
"""A budget is kept up to this share of it: sums of shares are off by rounding."""


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One decision: a layer or a tied group, its formats, their costs (choices, budgets) and sensitivities.

    A cost is a share of its budget; without limits there is one budget and every cost is zero.
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
    budgets = space.budgets()
    seen: set[str] = set()
    items = []
    for layer in space.layers:
        if layer.layer not in seen:
            members = [by_name[name] for name in grouped.get(layer.layer, (layer.layer,))]
            seen.update(member.layer for member in members)
            items.append(_item(members, budgets))
    return items


def _item(members: Sequence[LayerSpace], budgets: Sequence[tuple[str, float]]) -> Item:
    common = [
        c.spec for c in members[0].candidates if all(any(c.spec == o.spec for o in m.candidates) for m in members)
    ]
    if not common:
        raise InfeasibleError("tied layers have no format in common", where=", ".join(m.layer for m in members))
    rows = [[member.candidate(spec) for member in members] for spec in common]
    shares = [[sum(costs(c)[column] for c in row) / max(budget, 1e-300) for column, budget in budgets] for row in rows]
    return Item(
        tuple(member.layer for member in members),
        tuple(common),
        np.array(shares, np.float64) if budgets else np.zeros((len(rows), 1)),
        np.array([sum(c.sensitivity for c in row) for row in rows]),
    )


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
