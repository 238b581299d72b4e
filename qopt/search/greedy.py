"""Convex-hull greedy for the multiple-choice knapsack of per-layer formats, with its own optimality gap.

Start from the cheapest format of every layer and walk the convex hulls of (cost, sensitivity) in the order of gain
per cost while the limits hold (Sinha and Zoltners 1979). Where one layer holds most of the weights a step of it may
not fit any more, so other starts are tried: the walk with the heaviest layer pinned to each of its formats, every
layer at its best format, walked down the hulls until the limits hold, the best plan in which all layers have equal
widths, and the cheapest plan. Each start is improved by single changes and by exchanges of two; the best wins. The
linear relaxation, free from the hulls, bounds the optimum from below.

A Lipschitz limit is no sum over layers, but its tangent is one that every plan within the limit keeps: it is one more
budget for the walks and for the bound, and each plan and each change is held to the limit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search.ceiling import ROUNDING, Ceiling, build_ceiling, keeps, with_tangent
from qopt.search.feasible import a_plan
from qopt.search.items import FULL, Item, build_items, spending, total
from qopt.search.space import Candidate, LayerSpace, Outcome, Space
from qopt.spec import WeightSpec

Column = NDArray[np.float64]

STRETCHES = (1.0, 1.1, 1.5)
"""By how much the tangent of a Lipschitz limit is taken for steeper: plans far from where it touches stretch more."""


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
        picks, bound = solve(items, build_ceiling(space, items))
        gap = gap_of(total(items, picks), bound)
        note = f"no plan within the limits lowers the summed sensitivity by more than {100 * gap:.2f} %"
        return outcome(space, items, picks, note, gap)


def solve(items: Sequence[Item], ceiling: Ceiling | None) -> tuple[list[int], float]:
    """The plan, and a sum of sensitivities that no plan within the limits undercuts.

    Raises:
        InfeasibleError: no combination keeps the limits.
    """
    picks = min((improve(items, start, ceiling) for start in starts(items, ceiling)), key=lambda p: total(items, p))
    return picks, lower_bound(items if ceiling is None else with_tangent(items, ceiling, picks))


def gap_of(value: float, bound: float) -> float:
    """How far a sum may be above the least one, as a share of it."""
    return max(value - bound, 0.0) / abs(value) if value else 0.0


def outcome(space: Space, items: Sequence[Item], picks: Sequence[int], note: str, gap: float) -> Outcome:
    """A plan as the job takes it, with the candidates that each format was preferred to."""
    specs = {name: item.specs[p] for item, p in zip(items, picks, strict=True) for name in item.layers}
    ordered = {layer.layer: specs[layer.layer] for layer in space.layers}
    reasons = {layer.layer: _reason(layer, layer.candidate(specs[layer.layer])) for layer in space.layers}
    return Outcome(ordered, reasons, (note,), gap)


def hull(weight: Column, sensitivity: Column) -> list[int]:
    """Choices on the lower convex hull of (weight, sensitivity), cheapest first."""
    kept: list[int] = []
    for i in np.lexsort((sensitivity, weight)).tolist():
        if kept and sensitivity[i] >= sensitivity[kept[-1]]:
            continue
        while len(kept) >= 2 and _slope(weight, sensitivity, *kept[-2:]) <= _slope(weight, sensitivity, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _slope(weight: Column, sensitivity: Column, a: int, b: int) -> float:
    """Sensitivity saved for each unit of weight from choice ``a`` to the dearer ``b``."""
    return float((sensitivity[a] - sensitivity[b]) / max(weight[b] - weight[a], 1e-300))


def _steps(items: Sequence[Item], weights: Sequence[Column]) -> list[tuple[float, int, int, int]]:
    """Every hull edge as (saving per weight, item, from, to), best first."""
    edges = []
    for index, (item, weight) in enumerate(zip(items, weights, strict=True)):
        sensitivity = item.sensitivities
        edges += [(_slope(weight, sensitivity, a, b), index, a, b) for a, b in pairwise(hull(weight, sensitivity))]
    return sorted(edges, key=lambda e: (-e[0], e[1]))


def starts(items: Sequence[Item], ceiling: Ceiling | None = None) -> list[list[int]]:
    """Plans within the limits to improve upon; raises InfeasibleError where no plan keeps the limits."""
    least = a_plan(items, ceiling)
    if least is None:
        raise InfeasibleError("no combination of formats keeps the limits")
    found = _walks(items)
    if ceiling is not None:
        for stretch in STRETCHES:
            found += _walks(with_tangent(items, ceiling, least, stretch))
    kept = [least, *(picks for picks in found if keeps(items, ceiling, picks))]
    return [list(picks) for picks in dict.fromkeys(map(tuple, kept))]


def _walks(items: Sequence[Item]) -> list[list[int]]:
    return [walk_up(items), *pinned_walks(items), walk_down(items), *equal_widths(items)]


def pinned_walks(items: Sequence[Item]) -> list[list[int]]:
    """For every format of the item of largest cost, the walk up of all others beside it."""
    index = max(range(len(items)), key=lambda i: float(items[i].weight.max()))
    heavy = items[index]
    plans = []
    for choice in range(len(heavy.specs)):
        pinned = Item(heavy.layers, heavy.specs[choice:][:1], heavy.costs[[choice]], heavy.sensitivities[[choice]])
        picks = walk_up([*items[:index], pinned, *items[index + 1 :]])
        picks[index] = choice
        plans.append(picks)
    return plans


def walk_down(items: Sequence[Item]) -> list[int]:
    """Best choices, then down the hulls by the smallest loss per weight saved until the limits hold."""
    weights = [item.weight for item in items]
    picks = [hull(item.weight, item.sensitivities)[-1] for item in items]
    spent = spending(items, picks)
    for _, index, source, target in reversed(_steps(items, weights)):
        if (spent <= FULL).all():
            spent = spending(items, picks)  # what was added up step by step may be off in the last digits
            if (spent <= FULL).all():
                break
        if picks[index] == target:
            picks[index] = source
            spent = spent - items[index].costs[target] + items[index].costs[source]
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
    weights = [item.weight for item in items]
    picks = [hull(item.weight, item.sensitivities)[0] for item in items]
    spent = spending(items, picks)
    for _, index, source, target in _steps(items, weights):
        if picks[index] != source:
            continue
        after = spent - items[index].costs[source] + items[index].costs[target]
        if (after <= FULL).all():
            picks[index], spent = target, after
    return picks


def lower_bound(items: Sequence[Item]) -> float:
    """No plan within the limits has a lower summed sensitivity: the best of the linear relaxations under one budget
    each and under their sum."""
    budgets = items[0].costs.shape[1]
    bounds = [_relaxation(items, [item.costs[:, b] for item in items], 1.0) for b in range(budgets)]
    return max(*bounds, _relaxation(items, [item.weight for item in items], float(budgets)))


def _relaxation(items: Sequence[Item], weights: Sequence[Column], room: float) -> float:
    """The least summed sensitivity of mixtures of choices whose weights sum to at most ``room``."""
    first = [hull(weight, item.sensitivities)[0] for item, weight in zip(items, weights, strict=True)]
    value = total(items, first)
    room = room * FULL - sum(float(weight[i]) for weight, i in zip(weights, first, strict=True))
    for slope, index, source, target in _steps(items, weights):
        if room <= 0:
            break
        taken = min(float(weights[index][target] - weights[index][source]), room)
        value -= slope * taken
        room -= taken
    return value


def improve(items: Sequence[Item], picks: list[int], ceiling: Ceiling | None = None) -> list[int]:
    """Best single change or exchange of two, until none helps."""
    index = np.array([i for i, item in enumerate(items) for _ in item.specs])
    choice = np.array([c for item in items for c in range(len(item.specs))])
    cost = np.concatenate([item.costs for item in items])
    sensitivity = np.concatenate([item.sensitivities for item in items])
    starts = np.cumsum([0, *[len(item.specs) for item in items[:-1]]])
    picks = list(picks)

    def after(moves: Sequence[int]) -> list[int]:
        changed = list(picks)
        for move in moves:
            changed[int(index[move])] = int(choice[move])
        return changed

    def allowed(moves: Sequence[int]) -> bool:
        return ceiling is None or ceiling.keeps(after(moves))

    while True:
        current = starts + np.array(picks)
        spare = FULL - cost[current].sum(axis=0)
        gain = sensitivity[current][index] - sensitivity
        extra = cost - cost[current][index]
        if ceiling is not None:  # the tangent never rises more than the constant: what it forbids is forbidden
            extra = np.column_stack([extra, np.concatenate(ceiling.rises(picks))])
            spare = np.append(spare, ceiling.bound - ceiling.constant(picks) + ROUNDING)
        moves = _best_moves(index, gain, extra, spare, allowed)
        if not moves:
            return picks
        picks = after(moves)


def _best_moves(
    index: NDArray[np.int64], gain: Column, extra: Column, spare: Column, allowed: Callable[[Sequence[int]], bool]
) -> list[int]:
    tiny = 1e-12 * (1 + np.abs(gain).max())
    best, moves = _best(np.where((extra <= spare).all(axis=1), gain, -np.inf), tiny, (), allowed)
    for up in np.flatnonzero(gain > best):
        both = np.where((index != index[up]) & (extra + extra[up] <= spare).all(axis=1), gain + gain[up], -np.inf)
        best, found = _best(both, best, (int(up),), allowed)
        moves = found or moves
    return moves


def _best(
    gain: Column, least: float, first: tuple[int, ...], allowed: Callable[[Sequence[int]], bool]
) -> tuple[float, list[int]]:
    """The best allowed move after ``first`` that gains more than ``least``, with its gain; else ``least`` and none."""
    while (value := float(gain.max())) > least:
        moves = [*first, int(gain.argmax())]
        if allowed(moves):
            return value, moves
        gain[moves[-1]] = -np.inf
    return least, []


def _reason(layer: LayerSpace, chosen: Candidate) -> str:
    others = sorted((c for c in layer.candidates if c.spec != chosen.spec), key=lambda c: c.code_bits)
    compared = ", ".join(f"{c.spec} {c.sensitivity:.3g}" for c in others)
    return f"sensitivity {chosen.sensitivity:.3g}" + (f" (others: {compared})" if compared else " (only candidate)")
