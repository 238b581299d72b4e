"""Whether any plan keeps the limits, and where none does, which limit and how far one can get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from qopt.errors import InfeasibleError
from qopt.limits import Limit
from qopt.limits import readable as readable_cost
from qopt.search.ceiling import Ceiling, build_ceiling, keeps
from qopt.search.items import FULL, Item, build_items, total
from qopt.search.solver import gentlest_plan, minimise
from qopt.search.space import LayerSpace, Space, costs

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
    for limit, column, budget in space.limited():
        least = least_spent(space.layers, column)
        if least > budget:
            return InfeasibleError(
                "no plan keeps the limit", where=str(limit), got=_reachable(space, limit, column, least),
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
    """For limits on sums that can each be kept alone, but not at once: what can be reached of one within the others."""
    limited = space.limited()
    try:
        items = build_items(space)
    except InfeasibleError as error:
        return error
    for place, (limit, column, budget) in enumerate(limited if len(limited) > 1 else ()):
        others = [
            replace(item, costs=np.delete(item.costs, place, axis=1), sensitivities=item.costs[:, place])
            for item in items
        ]
        picks = minimise(others, None, 1.0, SECONDS).picks
        if picks is not None and budget > 0:
            got = _reachable(space, limit, column, budget * total(others, picks))
            within = ", ".join(dict.fromkeys(str(other) for i, (other, _, _) in enumerate(limited) if i != place))
            return InfeasibleError(
                "no plan keeps all limits at once", where=str(limit), got=f"{got}, within {within}", fix="raise a limit"
            )
    return None


def _reachable(space: Space, limit: Limit, column: str, least: float) -> str:
    """The cheapest value of a limited quantity that a plan can have."""
    if column == "code_bits":
        return f"at least {least / space.weights:.4g} bits with these candidates"
    if column == "bytes":
        least = least + space.table_bytes
        return f"at least {least:.0f} bytes, the tables of all candidate formats included, with these candidates"
    found = readable_cost(limit.quantity, least + space.beside(column))
    return f"at least {found} {column.removeprefix(limit.quantity).strip()} with these candidates"


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
