"""The Lipschitz constant of a network as a function of the norms of its layers: logarithms along an acyclic graph.

Every node carries ``v``, the logarithm of an upper bound of how much it stretches a change of the image. Along an edge
it grows by the edge's constants and by the logarithm of a layer's norm. Where edges join, stretches add up, or their
squares do: ``v = log sum_e exp(p v_e) / p``, p = 1 at sums and p = 2 at concatenations in l2. So ``v`` is a potential
of longest paths, ``v >= v_e`` for every edge, raised by what the other paths add; along a chain it is their sum.

``v`` is convex in the logarithms of the norms, which makes two statements exact that a search needs: a tangent never
lies above it, and ``v >= sum_e s_e v_e + H(s) / p`` for all shares ``s`` that sum to 1, H their entropy, with equality
where ``s`` is proportional to ``exp(p v_e)`` (Gibbs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from qopt.errors import PlanError


@final
@dataclass(frozen=True)
class Edge:
    """What one node reads of another.

    Attributes:
        source: place of the node that is read.
        offset: logarithm of the constants on the way, activations and pools for example.
        layer: the layer whose norm is one more factor, or None.
    """

    source: int
    offset: float = 0.0
    layer: str | None = None


@final
@dataclass(frozen=True)
class Node:
    """One value of the network; the image reads nothing.

    Attributes:
        name: of the node in the network.
        edges: what it reads.
        power: how edges join: 1 for sums, 2 for roots of sums of squares.
    """

    name: str
    edges: tuple[Edge, ...] = ()
    power: Literal[1, 2] = 1


@final
@dataclass(frozen=True)
class Potentials:
    """The graph: nodes in an order in which each follows what it reads, the image first, the logits last.

    Raises:
        PlanError: an edge that does not lead backwards, or a node but the first without edges.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        for place, node in enumerate(self.nodes):
            wrong = any(not 0 <= edge.source < place for edge in node.edges)
            if wrong or (not node.edges) != (place == 0):
                raise PlanError("no order of potentials", where=f"node {node.name!r}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers on its edges, each once."""
        return tuple(dict.fromkeys(e.layer for node in self.nodes for e in node.edges if e.layer is not None))

    def values(self, logs: Mapping[str, float]) -> list[float]:
        """``v`` of every node, for these logarithms of the layers' norms; the last is that of the network."""
        found: list[float] = []
        for node in self.nodes:
            reached = self.reached(node, found, logs)
            found.append(_joined(reached, node.power) if reached else 0.0)
        return found

    def shares(self, logs: Mapping[str, float]) -> list[tuple[float, ...]]:
        """Of every node, the shares of its edges in ``exp(p v)``: they sum to 1, and are empty for the image."""
        values = self.values(logs)
        return [
            tuple(math.exp(node.power * (one - value)) for one in self.reached(node, values, logs))
            for node, value in zip(self.nodes, values, strict=True)
        ]

    def slopes(self, logs: Mapping[str, float]) -> dict[str, float]:
        """By layer, the derivative of the network's ``v`` by the logarithm of its norm: the share of paths over it."""
        found = dict.fromkeys(self.layers, 0.0)
        flow = [0.0] * len(self.nodes)
        flow[-1] = 1.0
        for place, shares in reversed(list(enumerate(self.shares(logs)))):
            for edge, share in zip(self.nodes[place].edges, shares, strict=True):
                flow[edge.source] += share * flow[place]
                if edge.layer is not None:
                    found[edge.layer] += share * flow[place]
        return found

    @staticmethod
    def reached(node: Node, values: Sequence[float], logs: Mapping[str, float]) -> list[float]:
        """``v`` at the end of each of a node's edges, ``values`` being those of the nodes before it."""
        return [
            values[e.source] + e.offset + (0.0 if e.layer is None else logs[e.layer]) for e in node.edges
        ]  # fmt: skip


def entropy(shares: Sequence[float]) -> float:
    """``-sum s log s``."""
    return -math.fsum(s * math.log(s) for s in shares if s > 0)


def _joined(reached: Sequence[float], power: int) -> float:
    if len(reached) == 1:
        return reached[0]
    top = max(reached)
    return top + math.log(math.fsum(math.exp(power * (one - top)) for one in reached)) / power
