"""Exchanges: from a plan within the limits to a better one by single changes and changes of two items at once.

With prices ``p >= 0`` of the budgets, a change of an item has the reduced cost ``r = loss + p . extra``. Of two changes
that fit ``p . (extra_1 + extra_2) <= p . spare``, so that both together gain at most ``p . spare - r_1 - r_2``: all
pairs that can help are among the changes with ``r < p . spare - least r``. With the prices of the linear relaxation
and a plan near it these are a few hundred of thousands, and no pair that helps is missed (the bound of Pisinger 1995).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qopt.search.ceiling import ROUNDING, Ceiling
from qopt.search.items import FULL, Item

Column = NDArray[np.float64]

MOST: Final = 300
"""Changes that are paired with each other at most, those of least reduced cost; all in plans near the relaxation."""

TRIED: Final = 2000
"""Changes that are held to a Lipschitz limit at most, best first, before a plan counts as improved."""


def improve(
    items: Sequence[Item], picks: Sequence[int], ceiling: Ceiling | None = None, prices: Column | None = None
) -> list[int]:
    """Best single change or exchange of two, until none helps.

    Args:
        items: what is decided.
        picks: a plan within the limits.
        ceiling: the Lipschitz limit, or None.
        prices: of the budgets, at least 0: what a budget is worth; zeros where they are not known.
    """
    index = np.repeat(np.arange(len(items)), [len(item.specs) for item in items])
    starts = np.cumsum([0, *[len(item.specs) for item in items[:-1]]])
    cost = np.concatenate([item.costs for item in items])
    sensitivity = np.concatenate([item.sensitivities for item in items])
    worth = np.zeros(cost.shape[1]) if prices is None else prices
    tiny = 1e-12 * (1 + np.ptp(sensitivity))
    now = np.array(picks)
    while True:
        current = starts + now
        spare = FULL - cost[current].sum(axis=0)
        gain = sensitivity[current][index] - sensitivity
        extra = cost - cost[current][index]
        reduced = extra @ worth - gain
        most = float(worth @ np.maximum(spare, 0.0))
        if ceiling is not None:  # the tangent never rises more than the constant: what it forbids is forbidden
            extra = np.column_stack([extra, np.concatenate(ceiling.rises(now.tolist()))])
            spare = np.append(spare, ceiling.bound - ceiling.constant(now.tolist()) + ROUNDING)
        found = _moves(index, gain, extra, spare, reduced, most, tiny)
        better = next((p for p in _plans(found, now, index, starts) if ceiling is None or ceiling.keeps(p)), None)
        if better is None:
            return [int(p) for p in now]
        now = np.array(better)


def _plans(
    moves: Iterator[NDArray[np.int64]], picks: NDArray[np.int64], index: NDArray[np.int64], starts: NDArray[np.int64]
) -> Iterator[list[int]]:
    """The plans behind changes, as many as are tried."""
    for _, move in zip(range(TRIED), moves, strict=False):
        changed = picks.copy()
        changed[index[move]] = move - starts[index[move]]
        yield changed.tolist()


def _moves(
    index: NDArray[np.int64], gain: Column, extra: Column, spare: Column, reduced: Column, most: float, tiny: float
) -> Iterator[NDArray[np.int64]]:
    """Changes of one item or two that fit and gain more than ``tiny``, best first."""
    eligible = np.flatnonzero(reduced < most - min(float(reduced.min()), 0.0) + tiny)
    if len(eligible) > MOST:
        eligible = np.sort(eligible[np.argsort(reduced[eligible], kind="stable")[:MOST]])
    alone = np.flatnonzero((gain > tiny) & (extra <= spare).all(axis=1))
    ups = eligible[gain[eligible] > tiny]
    both = gain[ups][:, None] + gain[eligible][None]
    fits = (both > tiny) & (index[ups][:, None] != index[eligible][None])
    for row in np.flatnonzero(_reach(extra, ups) + _reach(extra, eligible) > spare):
        fits &= extra[ups, row][:, None] + extra[eligible, row][None] <= spare[row]
    first, second = np.nonzero(fits)
    values = np.concatenate([gain[alone], both[first, second]])
    for place in _descending(values):
        if place < len(alone):
            yield alone[place : place + 1]
        else:
            pair = place - len(alone)
            yield np.array([ups[first[pair]], eligible[second[pair]]])


def _descending(values: Column) -> Iterator[int]:
    """Places by falling value; sorted only where more than the first is asked for."""
    if len(values):
        best = int(values.argmax())
        yield best
        yield from (int(i) for i in np.argsort(-values, kind="stable") if i != best)


def _reach(extra: Column, some: NDArray[np.int64]) -> Column:
    """The most that one of some changes takes of every budget."""
    found: Column = extra[some].max(axis=0) if len(some) else np.full(extra.shape[1], -np.inf)
    return found
