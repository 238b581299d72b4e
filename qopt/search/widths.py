"""Widths of activations, chosen together with the formats of weights: what a layer costs depends on both.

All layers that read a tensor read the same codes. So layers that share a tensor, and tensors that share a layer, are
one decision: every width of the tensors with every format of the layers that no other undercuts, both priced at these
widths. The multiple-choice knapsack of those decisions is solved as that of formats alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Final, final

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError
from qopt.search import greedy
from qopt.search.feasible import infeasible
from qopt.search.items import Item, share, total
from qopt.search.space import LayerSpace, Row, Space
from qopt.spec import ActivationSpec, WeightSpec

MOST: Final = 4096
"""Choices of one decision; tensors that bind so many layers together keep their first format."""

Costs = Mapping[tuple[str, int], Mapping[WeightSpec, Mapping[str, float]]]
"""Layer and bits of what it reads to the costs of its formats, by column; formats that nothing takes there are absent.
"""


@final
@dataclass(frozen=True)
class TensorSpace:
    """A tensor of activations: the layers that read it, its formats and what each alone does to the network.

    The first format is what the tensor has where nothing is gained by another; sensitivities are in the unit of those
    of the layers.
    """

    tensor: str
    readers: tuple[str, ...]
    sensitivities: Mapping[ActivationSpec, float]

    @property
    def first(self) -> ActivationSpec:
        """The format that the search begins with."""
        return next(iter(self.sensitivities))


@final
@dataclass(frozen=True)
class Widths:
    """What was chosen: tensor to format, the gap of the search, and tensors that were left as they were.

    ``total`` is the summed sensitivity of weights and activations, ``gap`` how far that can be above the least, as a
    share of it.
    """

    specs: dict[str, ActivationSpec]
    total: float
    gap: float
    left: tuple[str, ...]


def choose_widths(space: Space, tensors: Sequence[TensorSpace], costs: Costs) -> Widths:
    """The formats of the tensors in the plan of least summed sensitivity within the limits.

    ``space`` has the layers' candidates and the limits; its costs are not looked at, and neither are ties of formats
    and a limit on the Lipschitz constant.

    Raises:
        InfeasibleError: no combination keeps the limits.
    """
    rows = [row for row in space.rows() if row.limit.quantity != "lipschitz"]
    groups = [_Group.of(part, costs, rows) for part in _components(space, tensors)]
    items = [group.item for group in groups]
    try:
        picks, bound = greedy.solve(items, None)
    except InfeasibleError as error:
        raise infeasible(space) from error
    chosen = {
        tensor.tensor: spec
        for group, pick in zip(groups, picks, strict=True)
        for tensor, spec in zip(group.tensors, group.widths[pick], strict=True)
    }
    left = tuple(tensor.tensor for group in groups for tensor in group.tensors if group.fixed)
    value = total(items, picks)
    return Widths({one.tensor: chosen[one.tensor] for one in tensors}, value, greedy.gap_of(value, bound), left)


def best_in_one(space: Space, tensors: Sequence[TensorSpace], costs: Costs) -> ActivationSpec | None:
    """The format that loses least where all tensors have the same one, but not the first; None where none keeps the
    limits."""
    found: dict[ActivationSpec, float] = {}
    for spec in list(tensors[0].sensitivities)[1:] if tensors else []:
        alike = [replace(one, sensitivities={spec: one.sensitivities[spec]}) for one in tensors]
        with suppress(InfeasibleError):
            found[spec] = choose_widths(space, alike, costs).total
    return min(found, key=found.__getitem__, default=None)


Part = tuple[tuple[LayerSpace, ...], tuple[TensorSpace, ...]]


def _components(space: Space, tensors: Sequence[TensorSpace]) -> list[Part]:
    """Layers and tensors that are bound together, in the order of the layers."""
    graph = nx.Graph()
    graph.add_nodes_from(("layer", layer.layer) for layer in space.layers)
    graph.add_edges_from((("layer", reader), ("tensor", one.tensor)) for one in tensors for reader in one.readers)
    found = []
    for nodes in nx.connected_components(graph):
        layers = tuple(layer for layer in space.layers if ("layer", layer.layer) in nodes)
        found.append((layers, tuple(one for one in tensors if ("tensor", one.tensor) in nodes)))
    return found


@final
@dataclass(frozen=True, eq=False)
class _Group:
    """One decision: its tensors, the formats that they have under each choice, and the choices as the solver sees them.

    ``fixed``: there were too many choices, the tensors keep their first format.
    """

    tensors: tuple[TensorSpace, ...]
    widths: list[tuple[ActivationSpec, ...]]
    item: Item
    fixed: bool

    @staticmethod
    def of(part: Part, costs: Costs, rows: Sequence[Row]) -> _Group:
        layers, tensors = part
        options = list(product(*(one.sensitivities for one in tensors)))
        fixed = not _fits(layers, options)
        if fixed:
            options = [tuple(one.first for one in tensors)]
        tables = [_choices(layers, tensors, option, costs, rows) for option in options]
        points = np.concatenate([points for points, _ in tables])
        specs = [spec for _, specs in tables for spec in specs]
        widths = [option for option, (found, _) in zip(options, tables, strict=True) for _ in found]
        kept = efficient(points)
        if not kept:
            raise InfeasibleError(
                "nothing takes any format of a layer at any width of activations",
                where=", ".join(layer.layer for layer in layers), fix="leave out a target",
            )  # fmt: skip
        item = Item(
            tuple(layer.layer for layer in layers), tuple(specs[i] for i in kept), points[kept, :-1], points[kept, -1]
        )
        return _Group(tensors, [widths[i] for i in kept], item, fixed and bool(tensors))


def _fits(layers: Sequence[LayerSpace], options: Sequence[object]) -> bool:
    return len(options) * prod(len(layer.candidates) for layer in layers) <= MOST


Table = tuple[NDArray[np.float64], list[WeightSpec]]
"""Choices (n, budgets + 1): shares of all budgets, then the sensitivity; and of each its widest format."""


def _choices(
    layers: Sequence[LayerSpace], tensors: Sequence[TensorSpace], option: Sequence[ActivationSpec], costs: Costs,
    rows: Sequence[Row],
) -> Table:  # fmt: skip
    """All formats of the layers under one width of every tensor, but for those that another undercuts."""
    points = np.zeros((1, max(len(rows), 1) + 1))
    points[0, -1] = sum(one.sensitivities[spec] for one, spec in zip(tensors, option, strict=True))
    specs: list[WeightSpec] = []
    for layer in layers:
        read = [spec for one, spec in zip(tensors, option, strict=True) if layer.layer in one.readers]
        own, formats = _formats(layer, costs, max((spec.bits for spec in read), default=0), rows)
        points = (points[:, None] + own[None]).reshape(-1, points.shape[1])
        widest = [max(one, other, key=_width) for one in specs for other in formats] if specs else formats
        kept = efficient(points)
        points, specs = points[kept], [widest[i] for i in kept]
    return points, specs


def _formats(layer: LayerSpace, costs: Costs, bits: int, rows: Sequence[Row]) -> Table:
    """The candidates of one layer that reads activations of so many bits, 0 for none whose width is chosen."""
    priced = costs[layer.layer, bits]
    taken = [candidate for candidate in layer.candidates if candidate.spec in priced]
    shares = [
        [share(priced[c.spec][row.column], row.room) if row.counts(layer.layer) else 0.0 for row in rows] or [0.0]
        for c in taken
    ]
    table = np.array(shares, np.float64).reshape(len(taken), max(len(rows), 1))
    return np.column_stack([table, [c.sensitivity for c in taken]]), [c.spec for c in taken]


def _width(spec: WeightSpec) -> float:
    return spec.container_bits


def efficient(points: NDArray[np.float64]) -> list[int]:
    """Places of the rows (n, quantities) that no other undercuts in any quantity without being more in another, by
    their last quantity; of equals the first."""
    kept: list[int] = []
    front = np.empty((0, points.shape[1]))
    for i in np.lexsort((*points[:, :-1].T[::-1], points[:, -1])).tolist():
        if not (front <= points[i]).all(axis=1).any():
            kept.append(i)
            front = np.vstack([front, points[i]])
    return kept
