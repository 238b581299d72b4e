"""Convex-hull greedy for the multiple-choice knapsack of per-layer formats, with its own optimality gap.

Start from the cheapest format of every layer and walk the convex hulls of (cost, sensitivity) in the order of gain
per cost while the limits hold (Sinha and Zoltners 1979). Where one layer holds most of the weights a step of it may
not fit any more, so two more starts are tried: every layer at its best format, walked down the hulls until the limits
hold, and the best plan in which all layers have equal widths. Each start is improved by single changes and by
exchanges of two; the best wins. The linear relaxation, free from the hulls, bounds the optimum from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search.space import Candidate, LayerSpace, Outcome, Space, costs
from qopt.spec import WeightSpec

_SLACK = 1e-9


@final
@dataclass(frozen=True)
class Item:
    """One decision: a layer or a tied group, its formats, their costs (choices, budgets) and sensitivities."""

    layers: tuple[str, ...]
    specs: tuple[WeightSpec, ...]
    costs: NDArray[np.float64]
    sensitivities: NDArray[np.float64]

    @property
    def weight(self) -> NDArray[np.float64]:
        """Costs joined to one column: the sum of each cost's share of its budget."""
        total: NDArray[np.float64] = self.costs.sum(axis=1)
        return total


@final
@dataclass(frozen=True)
class GreedySearch:
    """Minimise the summed sensitivity under all limits at once."""

    name: ClassVar[str] = "greedy"
    uses_sensitivity: ClassVar[bool] = True

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """All of the target's formats."""
        return target

    def __call__(self, space: Space) -> Outcome:
        """Solve; raises InfeasibleError where no combination keeps the limits."""
        items = build_items(space)
        picks = min((improve(items, start) for start in starts(items)), key=lambda p: total(items, p))
        value = total(items, picks)
        bound = lower_bound(items)
        gap = (value - bound) / value if value > 0 else 0.0
        specs = {name: item.specs[p] for item, p in zip(items, picks, strict=True) for name in item.layers}
        ordered = {layer.layer: specs[layer.layer] for layer in space.layers}
        reasons = {layer.layer: _reason(layer, layer.candidate(specs[layer.layer])) for layer in space.layers}
        return Outcome(
            ordered, reasons, (f"greedy is within {100 * max(gap, 0.0):.2f} % of the optimum",), max(gap, 0.0)
        )


def build_items(space: Space) -> list[Item]:
    """One item per tied group or single layer, costs divided by the budgets (one zero column without limits)."""
    by_name = {layer.layer: layer for layer in space.layers}
    grouped = {name: group for group in space.ties for name in group}
    seen: set[str] = set()
    items = []
    for layer in space.layers:
        if layer.layer in seen:
            continue
        members = [by_name[name] for name in grouped.get(layer.layer, (layer.layer,))]
        seen.update(member.layer for member in members)
        items.append(_item(members, space.budgets()))
    return items


def _item(members: Sequence[LayerSpace], budgets: Sequence[tuple[str, float]]) -> Item:
    common = [c.spec for c in members[0].candidates if all(c.spec in _specs(m) for m in members)]
    if not common:
        raise InfeasibleError("tied layers have no format in common", where=", ".join(m.layer for m in members))
    rows = [[member.candidate(spec) for member in members] for spec in common]
    columns = [[sum(costs(c)[column] for c in row) / max(budget, 1e-300) for column, budget in budgets] for row in rows]
    return Item(
        tuple(member.layer for member in members),
        tuple(common),
        np.array(columns, np.float64).reshape(len(rows), max(len(budgets), 0)) if budgets else np.zeros((len(rows), 1)),
        np.array([sum(c.sensitivity for c in row) for row in rows]),
    )


def _specs(layer: LayerSpace) -> set[WeightSpec]:
    return {candidate.spec for candidate in layer.candidates}


def hull(item: Item) -> list[int]:
    """Choices on the lower convex hull of (weight, sensitivity), cheapest first."""
    order = sorted(range(len(item.specs)), key=lambda i: (item.weight[i], item.sensitivities[i]))
    kept: list[int] = []
    for i in order:
        if kept and item.sensitivities[i] >= item.sensitivities[kept[-1]]:
            continue
        while len(kept) >= 2 and _slope(item, kept[-2], kept[-1]) <= _slope(item, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _slope(item: Item, a: int, b: int) -> float:
    """Sensitivity saved for each unit of weight from choice ``a`` to the dearer ``b``."""
    return float((item.sensitivities[a] - item.sensitivities[b]) / max(item.weight[b] - item.weight[a], 1e-300))


def _steps(items: Sequence[Item]) -> list[tuple[float, int, int, int]]:
    """Every hull edge as (saving per weight, item, from, to), best first."""
    edges = []
    for index, item in enumerate(items):
        points = hull(item)
        edges += [(_slope(item, a, b), index, a, b) for a, b in pairwise(points)]
    return sorted(edges, key=lambda e: (-e[0], e[1]))


def total(items: Sequence[Item], picks: Sequence[int]) -> float:
    """Summed sensitivity of a plan."""
    return sum(float(item.sensitivities[p]) for item, p in zip(items, picks, strict=True))


def spending(items: Sequence[Item], picks: Sequence[int]) -> NDArray[np.float64]:
    """Share of every budget that a plan spends: (budgets,)."""
    spent: NDArray[np.float64] = np.sum([item.costs[p] for item, p in zip(items, picks, strict=True)], axis=0)
    return spent


def starts(items: Sequence[Item]) -> list[list[int]]:
    """Plans within the limits to improve upon; raises InfeasibleError where there is none."""
    found = [walk_up(items), walk_down(items), *equal_widths(items)]
    feasible = [picks for picks in found if (spending(items, picks) <= 1 + _SLACK).all()]
    if not feasible:
        raise InfeasibleError("no combination of formats keeps the limits")
    return feasible


def walk_down(items: Sequence[Item]) -> list[int]:
    """Best choices, then down the hulls by the smallest loss per weight saved until the limits hold."""
    picks = [hull(item)[-1] for item in items]
    spent = spending(items, picks)
    for _, index, source, target in reversed(_steps(items)):
        if (spent <= 1 + _SLACK).all():
            break
        if picks[index] == target:
            picks[index] = source
            spent = spending(items, picks)
    return picks


def equal_widths(items: Sequence[Item]) -> list[list[int]]:
    """For every width, the plan whose layers have the best format of at most that container."""
    plans = []
    for width in sorted({spec.container_bits for item in items for spec in item.specs}):
        allowed = [[i for i, s in enumerate(item.specs) if s.container_bits <= width] for item in items]
        if all(allowed):
            plans.append(
                [min(few, key=item.sensitivities.__getitem__) for few, item in zip(allowed, items, strict=True)]
            )
    return plans


def walk_up(items: Sequence[Item]) -> list[int]:
    """Cheapest choices, then every hull step that still fits, in the order of saving per weight."""
    picks = [hull(item)[0] for item in items]
    spent = spending(items, picks)
    for _, index, source, target in _steps(items):
        if picks[index] != source:
            continue
        after = spent - items[index].costs[source] + items[index].costs[target]
        if (after <= 1 + _SLACK).all():
            picks[index], spent = target, after
    return picks


def lower_bound(items: Sequence[Item]) -> float:
    """The linear relaxation under the joined weight: no plan within the limits has a lower summed sensitivity."""
    value = sum(float(item.sensitivities[hull(item)[0]]) for item in items)
    room = items[0].costs.shape[1] - sum(float(item.weight[hull(item)[0]]) for item in items)
    for slope, index, source, target in _steps(items):
        step = float(items[index].weight[target] - items[index].weight[source])
        taken = min(step, room)
        value -= slope * taken
        room -= taken
        if room <= 0:
            break
    return value


def improve(items: Sequence[Item], picks: list[int]) -> list[int]:
    """Best single change or exchange of two, until none helps."""
    index = np.array([i for i, item in enumerate(items) for _ in item.specs])
    choice = np.array([c for item in items for c in range(len(item.specs))])
    cost = np.concatenate([item.costs for item in items])
    sensitivity = np.concatenate([item.sensitivities for item in items])
    starts = np.cumsum([0, *[len(item.specs) for item in items[:-1]]])
    picks = list(picks)
    while True:
        current = starts + np.array(picks)
        spare = 1 + _SLACK - cost[current].sum(axis=0)
        gain = sensitivity[current][index] - sensitivity
        extra = cost - cost[current][index]
        moves = _best_moves(index, gain, extra, spare)
        if not moves:
            return picks
        for move in moves:
            picks[int(index[move])] = int(choice[move])


def _best_moves(
    index: NDArray[np.int64], gain: NDArray[np.float64], extra: NDArray[np.float64], spare: NDArray[np.float64]
) -> list[int]:
    tiny = 1e-12 * (1 + np.abs(gain).max())
    single = np.where((extra <= spare).all(axis=1), gain, -np.inf)
    best, moves = float(single.max()), [int(single.argmax())]
    for up in np.flatnonzero(gain > max(best, tiny)):
        both = np.where((index != index[up]) & (extra + extra[up] <= spare).all(axis=1), gain + gain[up], -np.inf)
        if both.max() > best:
            best, moves = float(both.max()), [int(up), int(both.argmax())]
    return moves if best > tiny else []


def _reason(layer: LayerSpace, chosen: Candidate) -> str:
    others = sorted((c for c in layer.candidates if c.spec != chosen.spec), key=lambda c: c.code_bits)
    compared = ", ".join(f"{c.spec} {c.sensitivity:.3g}" for c in others)
    return f"sensitivity {chosen.sensitivity:.3g}" + (f" (others: {compared})" if compared else " (only candidate)")
