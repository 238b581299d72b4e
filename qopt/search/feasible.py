"""Whether any plan keeps the limits, and where none does, which limit and how far one can get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.limits import Limit
from qopt.limits import readable as readable_cost
from qopt.search.ceiling import Ceiling, build_ceiling, keeps
from qopt.search.items import FULL, Item, build_items
from qopt.search.solver import gentlest_plan, minimise
from qopt.search.space import LayerSpace, Row, Space, costs

CLOSE = 1e-6
"""How close to the cheapest value the one that is named must be, as a share."""

SECONDS = 10.0
"""How long a plan is looked for that keeps several limits at once; milliseconds suffice as a rule."""


def a_plan(items: Sequence[Item], ceiling: Ceiling | None) -> list[int] | None:
    """A plan within the limits, spending little where that suffices; None where no combination keeps them."""
    least = [int(item.weight.argmin()) for item in items]
    if keeps(items, ceiling, least):
        return least
    if (np.sum([item.costs.min(axis=0) for item in items], axis=0) > FULL).any():
        return None
    if ceiling is None:
        return minimise([replace(item, sensitivities=item.weight) for item in items], None, 1.0, SECONDS).picks
    gentlest = ceiling.gentlest()
    if keeps(items, ceiling, gentlest):
        return gentlest
    if ceiling.floor > ceiling.bound:
        return None
    return gentlest_plan(items, ceiling, SECONDS).picks


def feasible(space: Space) -> bool:
    """Whether any plan keeps the limits, with a candidate for every layer and a common one for tied layers."""
    if not all(layer.candidates for layer in space.layers):
        return False
    try:
        items = build_items(space)
    except InfeasibleError:
        return False
    return a_plan(items, build_ceiling(space, items)) is not None


def infeasible(space: Space) -> InfeasibleError:
    """The error for a space without a plan: the first limit that cannot be kept even alone, with what can be reached.

    Where each can be kept alone, of one limit what can be reached within the others.
    """
    for limit, rows in _by_limit(space).items():
        over = [row for row in rows if _least(space, row) > row.room]
        if over:
            worst = max(over, key=lambda row: row.base + _least(space, row))
            return InfeasibleError(
                "no plan keeps the limit", where=str(limit), got=_reachable(space, worst, _least(space, worst)),
                fix="raise the limit or choose a target with lower-bit candidates",
            )  # fmt: skip
    return (
        _too_steep(space)
        or _together(space)
        or InfeasibleError(
            "no plan keeps all limits and ties at once", got=", ".join(map(str, space.limits)), fix="raise a limit"
        )
    )


def _together(space: Space) -> InfeasibleError | None:
    """For linear limits that can each be kept alone, but not at once: what can be reached of one within the others."""
    rows = space.rows()
    try:
        items = build_items(space)
    except InfeasibleError as error:
        return error
    limits = _by_limit(space)
    for limit in limits if len(limits) > 1 else ():
        places = [place for place, row in enumerate(rows) if row.limit == limit]
        found = _cheapest(items, rows, places)
        if found is not None:
            row, least = found
            within = ", ".join(str(other) for other in limits if other != limit)
            got = f"{_reachable(space, row, least)}, within {within}"
            return InfeasibleError("no plan keeps all limits at once", where=str(limit), got=got, fix="raise a limit")
    return None


def _by_limit(space: Space) -> dict[Limit, list[Row]]:
    """The rows of every linear limit, in its order."""
    rows = space.rows()
    found = {limit: [row for row in rows if row.limit == limit] for limit in space.limits}
    return {limit: some for limit, some in found.items() if some}


def _cheapest(items: Sequence[Item], rows: Sequence[Row], places: Sequence[int]) -> tuple[Row, float] | None:
    """The least that layers can spend in the fullest of some rows within all others; None where nothing keeps those.

    Of one row by the solver, of several by bisection between plans that it finds.
    """
    others = [replace(item, costs=np.delete(item.costs, places, axis=1)) for item in items]
    spent = [np.stack([item.costs[:, p] * rows[p].room for p in places], axis=1) for item in items]
    if min(rows[p].room for p in places) <= 0:
        return None
    base = np.array([rows[p].base for p in places])
    picks = minimise([replace(o, sensitivities=s.sum(axis=1)) for o, s in zip(others, spent, strict=True)], None, 1.0,
                     SECONDS).picks  # fmt: skip
    low = float(np.max(base + np.sum([s.min(axis=0) for s in spent], axis=0)))
    best: tuple[float, list[int]] | None = None
    while picks is not None:
        peak = _peak(spent, base, picks)
        best = min(best or (peak, picks), (peak, picks))
        if len(places) == 1 or best[0] <= low * (1 + CLOSE):
            break
        middle = (low + best[0]) / 2
        capped = [replace(o, costs=np.hstack([o.costs, s / np.maximum(middle - base, 1e-300)]))
                  for o, s in zip(others, spent, strict=True)]  # fmt: skip
        picks = a_plan(capped, None)
        if picks is None:
            low, picks = middle, best[1]
    if best is None:
        return None
    sums = np.sum([s[p] for s, p in zip(spent, best[1], strict=True)], axis=0)
    fullest = int(np.argmax(base + sums))
    return rows[places[fullest]], float(sums[fullest])


def _peak(spent: Sequence[NDArray[np.float64]], base: NDArray[np.float64], picks: Sequence[int]) -> float:
    """The most that a plan takes in one of the rows."""
    return float(np.max(base + np.sum([s[p] for s, p in zip(spent, picks, strict=True)], axis=0)))


def _least(space: Space, row: Row) -> float:
    """The least that layers can spend in a row."""
    return least_spent((layer for layer in space.layers if row.counts(layer.layer)), row.column)


def _reachable(space: Space, row: Row, least: float) -> str:
    """The cheapest value of a limited quantity that a plan can have."""
    if row.column == "code_bits":
        return f"at least {least / space.weights:.4g} bits with these candidates"
    if row.column == "bytes":
        least = least + row.base
        return f"at least {least:.0f} bytes, the tables of all candidate formats included, with these candidates"
    quantity = row.limit.quantity
    found = f"{readable_cost(quantity, least + row.base)} {row.column.removeprefix(quantity).strip()}"
    return f"at least {found}{f' at node {row.place}' if row.place else ''} with these candidates"


def least_spent(layers: Iterable[LayerSpace], column: str) -> float:
    """The least that these layers can spend of one cost."""
    return sum(min(costs(c)[column] for c in layer.candidates) for layer in layers)


def _too_steep(space: Space) -> InfeasibleError | None:
    """For a Lipschitz limit that cannot be kept, alone or within the others."""
    try:
        items = build_items(space)
    except InfeasibleError as error:
        return error
    ceiling = build_ceiling(space, items)
    if ceiling is None or a_plan(items, None) is None:
        return None
    where = str(min(limit for limit in space.limits if limit.quantity == "lipschitz"))
    if ceiling.floor > ceiling.bound:
        got = f"at least {readable(ceiling.floor)} with these candidates"
        return InfeasibleError("no plan keeps the limit", where=where, got=got, fix="raise the limit")
    lowest = gentlest_plan(items, ceiling, SECONDS).bound
    others = ", ".join(map(str, space.additive)) or "the ties"
    got = f"at least {readable(max(lowest, ceiling.floor))} within {others}"
    return InfeasibleError("no plan keeps the limit", where=where, got=got, fix="raise a limit")


def readable(log: float) -> str:
    """The number of a natural logarithm, however large."""
    return f"{math.exp(log):.4g}" if log < 700 else f"1e+{log / math.log(10):.0f}"
