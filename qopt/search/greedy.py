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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search.ceiling import Ceiling, build_ceiling, keeps, with_tangent
from qopt.search.exchange import improve
from qopt.search.feasible import a_plan
from qopt.search.items import FULL, Item, build_items, spending, total
from qopt.search.solver import relaxed_prices
from qopt.search.space import Candidate, LayerSpace, Outcome, Space
from qopt.spec import WeightSpec

Column = NDArray[np.float64]

STRETCHES = (1.0, 1.1, 1.5)
"""By how much the tangent of a Lipschitz limit is taken for steeper: plans far from where it touches stretch more."""

IMPROVED, LEAST_IMPROVED = 20_000, 12
"""Starts of networks of so many choices in all are improved once, the best ones; of any network so many at least."""


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
    worth, choices = prices(items), sum(len(item.specs) for item in items)
    picks = best_plan(items, ceiling, worth, max(LEAST_IMPROVED, IMPROVED // choices))
    if ceiling is None:
        return picks, lower_bound(items, worth)
    tight = with_tangent(items, ceiling, picks)
    return picks, lower_bound(tight, prices(tight))


def best_plan(items: Sequence[Item], ceiling: Ceiling | None, worth: Column, improved: int) -> list[int]:
    """The best plan that the best few starts, so many, are improved to, with the prices of the budgets.

    Raises:
        InfeasibleError: no combination keeps the limits.
    """
    found = sorted(starts(items, ceiling, worth), key=lambda p: total(items, p))[:improved]
    return min((improve(items, start, ceiling, worth) for start in found), key=lambda p: total(items, p))


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


@final
@dataclass(frozen=True, eq=False)
class Hulls:
    """The hulls of all items under one weight.

    Attributes:
        cheapest: of every item, the first choice of its hull; ``best``: the last.
        index: of every edge of a hull its item, by falling saving per weight; ``source`` and ``target``: its choices.
        saving: sensitivity saved per weight; ``steps``: what it adds to every budget (edges, budgets).
    """

    cheapest: list[int]
    best: list[int]
    index: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    saving: Column
    steps: Column


def build_hulls(items: Sequence[Item], weights: Sequence[Column] | None = None) -> Hulls:
    """By the items' joined weight, or the given one of every item's choices."""
    weights = [item.weight for item in items] if weights is None else weights
    kept = [hull(weight, item.sensitivities) for item, weight in zip(items, weights, strict=True)]
    edges = [
        (_slope(weights[i], items[i].sensitivities, a, b), i, a, b)
        for i, choices in enumerate(kept) for a, b in pairwise(choices)
    ]  # fmt: skip
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    saving, index, source, target = zip(*edges, strict=True) if edges else ((), (), (), ())
    rows = [items[i].costs[b] - items[i].costs[a] for _, i, a, b in edges]
    return Hulls(
        [choices[0] for choices in kept], [choices[-1] for choices in kept], np.array(index, np.int64),
        np.array(source, np.int64), np.array(target, np.int64), np.array(saving, np.float64),
        np.array(rows, np.float64).reshape(-1, items[0].costs.shape[1]),
    )  # fmt: skip


def starts(items: Sequence[Item], ceiling: Ceiling | None = None, worth: Column | None = None) -> list[list[int]]:
    """Plans within the limits to improve upon; raises InfeasibleError where no plan keeps the limits."""
    least = a_plan(items, ceiling)
    if least is None:
        raise InfeasibleError("no combination of formats keeps the limits")
    found = _walks(items, worth)
    if ceiling is not None:
        for stretch in STRETCHES:
            tight = with_tangent(items, ceiling, least, stretch)
            found += _walks(tight, prices(tight))
    kept = [least, *equal_widths(items), *found]
    kept = [list(picks) for picks in dict.fromkeys(map(tuple, kept))]
    return [picks for picks in kept if keeps(items, ceiling, picks)]


def _walks(items: Sequence[Item], worth: Column | None) -> list[list[int]]:
    """By the joined weight, and by what the budgets are worth where there are several."""
    weightings = [[item.weight for item in items]]
    if worth is not None and len(worth) > 1:
        weightings.append([item.costs @ worth for item in items])
    found: list[list[int]] = []
    for weights in weightings:
        hulls = build_hulls(items, weights)
        found += [walk_up(items, hulls), *pinned_walks(items, hulls), walk_down(items, hulls)]
    return found


def pinned_walks(items: Sequence[Item], hulls: Hulls | None = None) -> list[list[int]]:
    """For every format of the item of largest cost, the walk up of all others beside it."""
    hulls = hulls or build_hulls(items)
    index = max(range(len(items)), key=lambda i: float(items[i].weight.max()))
    others = np.flatnonzero(hulls.index != index)
    plans = []
    for choice in range(len(items[index].specs)):
        cheapest = list(hulls.cheapest)
        cheapest[index] = choice
        plans.append(_climb(items, hulls, cheapest, others))
    return plans


def walk_down(items: Sequence[Item], hulls: Hulls | None = None) -> list[int]:
    """Best choices, then down the hulls by the smallest loss per weight saved until the limits hold."""
    hulls = hulls or build_hulls(items)
    picks = np.array(hulls.best)
    spent = spending(items, hulls.best) - np.vstack([np.zeros(hulls.steps.shape[1]), hulls.steps[::-1].cumsum(axis=0)])
    kept = (spent <= FULL).all(axis=1)
    first = int(kept.argmax()) if kept.any() else len(kept) - 1
    for taken in range(first, len(kept)):  # what was added up may be off in the last digits
        edges = np.arange(len(kept) - 1 - taken, len(kept) - 1)[::-1]
        picks[hulls.index[edges]] = hulls.source[edges]
        if (spending(items, picks.tolist()) <= FULL).all():
            break
    return [int(p) for p in picks]


def walk_up(items: Sequence[Item], hulls: Hulls | None = None) -> list[int]:
    """Cheapest choices, then every hull step that still fits, in the order of saving per weight."""
    hulls = hulls or build_hulls(items)
    return _climb(items, hulls, list(hulls.cheapest), np.arange(len(hulls.index)))


def _climb(items: Sequence[Item], hulls: Hulls, cheapest: list[int], edges: NDArray[np.int64]) -> list[int]:
    """Take edges in their order while they fit; an item stays below the first of its edges that does not."""
    picks, spent = np.array(cheapest), spending(items, cheapest)
    while len(edges):
        alone = (spent + hulls.steps[edges] <= FULL).all(axis=1)
        blocked = np.full(len(items), len(edges))
        np.minimum.at(blocked, hulls.index[edges[~alone]], np.flatnonzero(~alone))
        edges = edges[np.arange(len(edges)) < blocked[hulls.index[edges]]]
        ahead = spent + hulls.steps[edges].cumsum(axis=0)
        fits = (ahead <= FULL).all(axis=1)
        end = len(edges) if fits.all() else int(fits.argmin())
        if end:
            taken = edges[:end]
            picks[hulls.index[taken]] = hulls.target[taken]
            spent = ahead[end - 1]
        edges = edges[end:]
    return [int(p) for p in picks]


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


def lower_bound(items: Sequence[Item], worth: Column | None = None) -> float:
    """No plan within the limits has a lower summed sensitivity.

    With the prices ``worth`` of the budgets what `priced` gives, which at the prices of the linear relaxation is its
    value; else the best of the relaxations under one budget each and under their sum.
    """
    if worth is not None and worth.any():
        return priced(items, worth)
    joined = _relaxation(items, [item.weight for item in items], float(items[0].costs.shape[1]))[0]
    return max(joined, *(_relaxation(items, [item.costs[:, b] for item in items], 1.0)[0] for b in _scarce(items)))


def priced(items: Sequence[Item], worth: Column) -> float:
    """The least sum of sensitivities and prices of what is spent, less the price of all budgets: a bound for any
    prices of at least 0 (Fisher 1981)."""
    least = sum(float((item.sensitivities + item.costs @ worth).min()) for item in items)
    return least - FULL * float(worth.sum())


def prices(items: Sequence[Item]) -> Column:
    """What a full budget is worth in sensitivity by the linear relaxation, at least 0 each; (budgets,)."""
    if items[0].costs.shape[1] > 1:
        return relaxed_prices(items)
    return np.array([_relaxation(items, [item.costs[:, 0] for item in items], 1.0)[1]])


def _scarce(items: Sequence[Item]) -> list[int]:
    """The budgets that not every plan keeps; the first one where all are kept."""
    most = np.sum([item.costs.max(axis=0) for item in items], axis=0)
    return np.flatnonzero(most > FULL).tolist() or [0]


def _relaxation(items: Sequence[Item], weights: Sequence[Column], room: float) -> tuple[float, float]:
    """The least summed sensitivity of mixtures of choices whose weights sum to at most ``room``, and the saving per
    weight where the room ends, 0 where it does not."""
    hulls = build_hulls(items, weights)
    value, steps = total(items, hulls.cheapest), zip(hulls.index, hulls.source, hulls.target, strict=True)
    sizes = np.array([weights[i][b] - weights[i][a] for i, a, b in steps])
    room = room * FULL - sum(float(weight[i]) for weight, i in zip(weights, hulls.cheapest, strict=True))
    taken = np.clip(room - (np.cumsum(sizes) - sizes), 0.0, sizes)
    ends = np.flatnonzero(taken < sizes)
    return value - float(hulls.saving @ taken), float(hulls.saving[ends[0]]) if len(ends) else 0.0


def _reason(layer: LayerSpace, chosen: Candidate) -> str:
    others = sorted((c for c in layer.candidates if c.spec != chosen.spec), key=lambda c: c.code_bits)
    compared = ", ".join(f"{c.spec} {c.sensitivity:.3g}" for c in others)
    return f"sensitivity {chosen.sensitivity:.3g}" + (f" (others: {compared})" if compared else " (only candidate)")
