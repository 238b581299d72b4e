"""Cut a network into the parts whose layers are rounded together: single layers, or blocks (Li et al. 2021, BRECQ)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal, final

from torch.fx import GraphModule, Node

from qopt.passes.annotate import ABSORBED
from qopt.passes.nodes import activation_nodes, is_layer, op_of

Granularity = Literal["layer", "block"]

MOST_JOINED: Final = 8
"""Branches with more layers than this between their two ends (dense blocks) are cut like a network without any."""


@final
@dataclass(frozen=True)
class Block:
    """Consecutive nodes that depend on the image, of which the first is a layer.

    Attributes:
        nodes: in graph order.
        inputs: what they read of the nodes before them.
        outputs: those of them that later nodes read.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def layers(self) -> tuple[Node, ...]:
        """The calls that apply a weight."""
        return tuple(node for node in self.nodes if is_layer(node))


def blocks(graph: GraphModule, granularity: Granularity, most: int) -> list[Block]:
    """Every layer is in exactly one block; a ReLU or Clip that alone reads the last value belongs to it.

    ``layer``: one layer each. ``block``: all layers between a value that branches and the addition (or concatenation)
    that joins the branches again; elsewhere up to ``most`` consecutive layers.
    """
    return list(_Cutter(graph).blocks(1 if granularity == "layer" else most, joined=granularity == "block"))


@final
class _Cutter:
    def __init__(self, graph: GraphModule) -> None:
        depends = activation_nodes(graph)
        self._order = [node for node in graph.graph.nodes if node in depends]
        self._place = {node: place for place, node in enumerate(self._order)}
        self._last = [max((self._place[user] for user in node.users), default=-1) for node in self._order]

    def blocks(self, most: int, joined: bool) -> Iterator[Block]:
        cuts = self._cuts() if joined else []
        layers = [place for place, node in enumerate(self._order) if is_layer(node)]
        chain: list[int] = []
        for cut, group in groupby(layers, lambda place: next((c for c in cuts if c >= place), None)):
            region = list(group)
            if cut is not None and 1 < len(region) <= MOST_JOINED:
                yield from self._chained(chain, most)
                chain = []
                yield self._block(region[0], cut)
            else:
                chain += region
        yield from self._chained(chain, most)

    def _cuts(self) -> list[int]:
        """The places after which a single value is all that later nodes read."""
        cuts, alive = [], 0
        ends: dict[int, int] = {}
        for place, last in enumerate(self._last):
            alive += 1
            ends[max(last, place)] = ends.get(max(last, place), 0) + 1
            alive -= ends.pop(place, 0)
            if alive == 1:
                cuts.append(place)
        return cuts

    def _chained(self, layers: Sequence[int], most: int) -> Iterator[Block]:
        for start in range(0, len(layers), most):
            part = layers[start : start + most]
            yield self._block(part[0], part[-1])

    def _block(self, first: int, last: int) -> Block:
        users = list(self._order[last].users)
        if len(users) == 1 and op_of(users[0]) in ABSORBED and self._place[users[0]] == last + 1:
            last += 1
        nodes = self._order[first : last + 1]
        inside = set(nodes)
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n in self._place and n not in inside)
        outputs = [node for place, node in enumerate(nodes, first) if self._last[place] > last]
        return Block(tuple(nodes), tuple(read), tuple(outputs))
