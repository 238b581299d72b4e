"""A Lipschitz limit beside the additive ones: what the norms of chosen formats make of the network's constant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UsageError
from qopt.search.items import Item, keeps_limits
from qopt.search.potentials import Potentials
from qopt.search.space import LayerSpace, Space
from qopt.spec import WeightSpec

LEAST: Final = 1e-30
"""Norms below it count as it: a layer of zeros has no logarithm."""

ROUNDING: Final = 1e-9
"""What the sums behind a tangent may be off by."""

Plan = Sequence[int]
"""A choice for every item."""


@final
@dataclass(frozen=True, eq=False)
class Ceiling:
    """The logarithm of a network's Lipschitz constant must stay at or below ``bound``.

    Attributes:
        potentials: how the constant follows from norms.
        bound: logarithm of the limit, -inf for 0.
        layers: of every item, those of its layers that the potentials name.
        logs: of every item, the logarithms of their norms (layers, choices).
    """

    potentials: Potentials
    bound: float
    layers: tuple[tuple[str, ...], ...]
    logs: tuple[NDArray[np.float64], ...]

    def norms(self, picks: Plan) -> dict[str, float]:
        """Layer to the logarithm of its norm in a plan."""
        return self._by_layer([logs[:, p] for logs, p in zip(self.logs, picks, strict=True)])

    def constant(self, picks: Plan) -> float:
        """The logarithm of the plan's constant, from above."""
        return self.potentials.values(self.norms(picks))[-1]

    def keeps(self, picks: Plan) -> bool:
        """Whether a plan's constant is within the limit."""
        return self.constant(picks) <= self.bound

    @property
    def least(self) -> dict[str, float]:
        """Layer to the logarithm of its smallest norm."""
        return self._by_layer([logs.min(axis=1) for logs in self.logs])

    @property
    def most(self) -> dict[str, float]:
        """Layer to the logarithm of its largest norm."""
        return self._by_layer([logs.max(axis=1) for logs in self.logs])

    @property
    def floor(self) -> float:
        """The logarithm of a constant that no plan undercuts: that of all smallest norms at once."""
        return self.potentials.values(self.least)[-1]

    def gentlest(self) -> list[int]:
        """Every item in the choice that stretches least, by the paths of the plan in which all norms are smallest."""
        return [int(one.argmin()) for one in self._weighted(self.least)]

    def rises(self, picks: Plan) -> list[NDArray[np.float64]]:
        """Of every item, by how much each choice raises the tangent at ``picks``: the constant rises no less."""
        return [one - one[p] for one, p in zip(self._weighted(self.norms(picks)), picks, strict=True)]

    def _weighted(self, at: Mapping[str, float]) -> list[NDArray[np.float64]]:
        """Of every item, the logarithms summed over its layers with the slopes at these norms (choices,)."""
        slopes = self.potentials.slopes(at)
        return [np.array([slopes[n] for n in names]) @ logs for names, logs in zip(self.layers, self.logs, strict=True)]

    def _by_layer(self, columns: Sequence[NDArray[np.float64]]) -> dict[str, float]:
        return {
            name: float(log)
            for names, column in zip(self.layers, columns, strict=True)
            for name, log in zip(names, column, strict=True)
        }


def build_ceiling(space: Space, items: Sequence[Item]) -> Ceiling | None:
    """The space's Lipschitz limit over its items; None where it has none.

    Raises:
        UsageError: a format whose operator norm nobody computed, on a layer that the constant follows from.
    """
    if space.lipschitz is None or space.potentials is None:
        return None
    on_paths, by_name = set(space.potentials.layers), {layer.layer: layer for layer in space.layers}
    layers = tuple(tuple(name for name in item.layers if name in on_paths) for item in items)
    logs = tuple(
        np.array([[_log(by_name[name], spec) for spec in item.specs] for name in names]).reshape(-1, len(item.specs))
        for names, item in zip(layers, items, strict=True)
    )
    return Ceiling(space.potentials, math.log(space.lipschitz) if space.lipschitz else -math.inf, layers, logs)


def _log(layer: LayerSpace, spec: WeightSpec) -> float:
    norm = layer.candidate(spec).operator
    if norm is None:
        raise UsageError("a Lipschitz limit and a format without an operator norm", where=layer.layer, got=str(spec))
    return math.log(max(norm.upper, LEAST))


def keeps(items: Sequence[Item], ceiling: Ceiling | None, picks: Plan) -> bool:
    """Whether a plan keeps every limit."""
    return keeps_limits(items, picks) and (ceiling is None or ceiling.keeps(picks))


def with_tangent(items: Sequence[Item], ceiling: Ceiling, picks: Plan, stretch: float = 1.0) -> list[Item]:
    """The items with one cost more: their share in the room that the tangent at ``picks`` leaves below the ceiling.

    Every plan below the ceiling keeps this budget; the reverse holds near ``picks`` only, and from farther away with a
    ``stretch`` above 1.
    """
    rises = ceiling.rises(picks)
    lowest = ceiling.constant(picks) + math.fsum(float(rise.min()) for rise in rises)
    room = max(ceiling.bound - lowest, 0.0) + ROUNDING
    return [
        replace(item, costs=np.column_stack([item.costs, (rise - rise.min()) * (stretch / room)]))
        for rise, item in zip(rises, items, strict=True)
    ]
