"""The limit on a network's Lipschitz constant in l2: the graph it follows from, the norms of candidates, the result.

The constant is that of the network with its weights quantized, by the rules of `qopt.certificates.calculus`: products
along paths, sums at additions, roots of sums of squares at concatenations. Activation quantizers are staircases without
a constant; for them ``||f(x) - f(x')|| <= L ||x - x'|| + C``, the limit bounds L, and C comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

from torch import Tensor

from qopt.cache import Cache, digest_arrays
from qopt.certificates.calculus import Claim, NetworkBounds, multiplicity, network_bounds
from qopt.certificates.curves import UNIT
from qopt.certificates.local import Triple, local_bound
from qopt.certificates.maps import Convolution, Product, Shape
from qopt.certificates.network import Affine, Bend, Concat, Entry, Maximum, Network, Opaque, Step, Sum
from qopt.certificates.operator_norms import map_norm, operator_norm
from qopt.certificates.read import read
from qopt.errors import UnsupportedModelError
from qopt.graph.model import Layer
from qopt.job.run import Run
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.measure.norms import kept_bounds
from qopt.quantize import Applied, WeightOnly
from qopt.search.potentials import Edge, Node, Potentials
from qopt.search.space import LayerSpace
from qopt.spec import WeightSpec

OUTWARD: Final = 2.0**-34
"""Added to every logarithm: what the calculus rounds upwards per step, and the sums of logarithms themselves."""

STAIRS: Final = math.log1p(8 * UNIT)
"""Logarithm of what the quotient of an activation quantizer in float32 adds to its slope of 1."""

LEAST: Final = 1e-30
"""Smaller factors count as it."""


@final
@dataclass(frozen=True, eq=False)
class LayerUse:
    """One application of a layer's weight: the map, with the shape of what it is applied to."""

    map: Convolution | Product
    source: Shape


@final
@dataclass(frozen=True, eq=False)
class LipschitzGraph:
    """What a Lipschitz limit needs of a network.

    Attributes:
        potentials: how its constant follows from the norms of its layers.
        uses: layer to its uses on the way from image to logits.
    """

    potentials: Potentials
    uses: dict[str, tuple[LayerUse, ...]]


def lipschitz_limit(run: Run) -> Limit | None:
    """The tightest limit on the Lipschitz constant; None where there is none."""
    return min((limit for limit in run.target.limits if limit.quantity == "lipschitz"), default=None)


def lipschitz_graph(run: Run) -> LipschitzGraph:
    """The graph of the float network.

    Raises:
        UnsupportedModelError: no image can be run through the network, or an operator has no Lipschitz constant.
    """
    if run.unattacked:
        raise UnsupportedModelError(
            "a Lipschitz limit needs a network that one image can be run through", where="--limit", got=run.unattacked
        )
    twin = run.quantizer.float_graph
    layers = {node.name: str(node.meta["layer"]) for node in twin.graph.nodes if "layer" in node.meta}
    stairs = run.data is not None and not run.target.activations.is_float
    return _Builder(read(twin, run.prepared.input_shape), layers, STAIRS if stairs else 0.0).build()


@final
@dataclass(eq=False)
class _Builder:
    """Steps that multiply by a constant become offsets; layers and joins become nodes."""

    network: Network
    layers: dict[str, str]
    room: float
    nodes: list[Node] = field(default_factory=list)
    ends: list[Edge] = field(default_factory=list)
    uses: dict[str, list[LayerUse]] = field(default_factory=dict)

    def build(self) -> LipschitzGraph:
        for step in self.network.steps:
            sources = [self.ends[place] for place in step.inputs]
            self.ends.append(self._grown(self._end(step, sources), self.room))
        last, step = self.ends[-1], self.network.steps[-1]
        if last.offset or last.source < len(self.nodes) - 1:
            self._add(step, (last,))
        return LipschitzGraph(Potentials(tuple(self.nodes)), {name: tuple(uses) for name, uses in self.uses.items()})

    def _end(self, step: Step, sources: list[Edge]) -> Edge:
        """Where the value of a step can be read, with what lies behind the last node."""
        if isinstance(step, Entry):
            return self._add(step, ())
        if isinstance(step, (Sum, Concat)):
            grown = tuple(self._grown(edge, OUTWARD) for edge in sources)
            return self._add(step, grown, 2 if isinstance(step, Concat) else 1)
        layer = self.layers.get(step.name)
        if layer is not None and isinstance(step, Affine) and isinstance(step.map, (Convolution, Product)):
            source = self.network.steps[step.inputs[0]].shape
            self.uses.setdefault(layer, []).append(LayerUse(step.map, source))
            return self._add(step, (replace(self._grown(sources[0], OUTWARD), layer=layer),))
        return self._grown(sources[0], _log(self._constant(step)))

    def _constant(self, step: Step) -> float:
        source = self.network.steps[step.inputs[0]].shape
        if isinstance(step, Affine):
            return operator_norm(step.map, source, "l2")
        if isinstance(step, Bend):
            return step.curve.slope
        if isinstance(step, Maximum):
            return multiplicity(step, "l2")
        assert isinstance(step, Opaque)
        found = math.inf
        if len(step.inputs) == 1:
            found = local_bound(step, [Triple(1.0, 0.0, 1.0)], [source], "l2").bound.lipschitz
        if not math.isfinite(found):
            raise UnsupportedModelError(
                f"operator {step.op} has no Lipschitz constant that a limit could hold", where=f"node {step.name!r}",
                fix="leave out the limit on lipschitz",
            )  # fmt: skip
        return found

    def _add(self, step: Step, edges: tuple[Edge, ...], power: int = 1) -> Edge:
        self.nodes.append(Node(step.name, edges, 2 if power == 2 else 1))
        return Edge(len(self.nodes) - 1)

    @staticmethod
    def _grown(edge: Edge, by: float) -> Edge:
        return replace(edge, offset=edge.offset + by)


def _log(factor: float) -> float:
    return math.log(max(factor, LEAST)) + OUTWARD


def with_operator_norms(run: Run, graph: LipschitzGraph, spaces: Sequence[LayerSpace]) -> tuple[LayerSpace, ...]:
    """The layers with the l2 operator norm of every candidate, the largest over their uses; cached by content."""
    layers = {layer.name: layer for layer in run.prepared.layers}
    found = []
    for space in spaces:
        uses = graph.uses.get(space.layer, ())
        candidates = tuple(
            replace(c, operator=operator_bound(run.weights, layers[space.layer], c.spec, uses, run.cache))
            if uses
            else c
            for c in space.candidates
        )
        found.append(replace(space, candidates=candidates))
    return tuple(found)


def operator_bound(
    quantizer: WeightOnly, layer: Layer, spec: WeightSpec, uses: Sequence[LayerUse], cache: Cache
) -> NormBound:
    """The l2 operator norm of what a layer computes in a format, rounded to nearest; the largest over its uses."""
    key = {
        "weight": digest_arrays(quantizer.weight(layer).numpy()), "axis": layer.channel_axis, "groups": layer.groups,
        "format": str(spec), "uses": [_geometry(use) for use in uses],
    }  # fmt: skip

    def compute() -> list[NormBound]:
        weight = quantizer.quantized_weight(layer, spec).dequantize().double()
        return [NormBound.largest(_norm(use, weight, layer.name) for use in uses)]

    (bound,) = kept_bounds(cache, "operator-norms-l2", key, compute)
    return bound


def _geometry(use: LayerUse) -> list[object]:
    if isinstance(use.map, Product):
        return []
    convolution = use.map
    return [*map(list, (use.source, convolution.stride, convolution.padding, convolution.dilation)), convolution.groups]


def _norm(use: LayerUse, weight: Tensor, where: str) -> NormBound:
    """Of the map with another weight."""
    return map_norm(use.map.with_weight(weight), use.source, "l2", where=where)


def reached(run: Run, applied: Applied) -> NetworkBounds:
    """What the calculus says of a plan's own network, its weights as they were rounded in the end."""
    return network_bounds(applied.graph, run.prepared.input_shape, "l2")


def account(run: Run, bounds: NetworkBounds, limit: Limit) -> str:
    """One sentence for the report: the constant, the limit, what it means for the threat model, vacuous or not."""
    last = bounds.last
    text = f"Lipschitz constant in l2 at most {Claim(last.lipschitz, False)}, limit {limit.bound:.3g}"
    if run.options.std:  # the calculus takes images to be in [0, 1]
        return f"{text}, of the network behind the normalisation"
    eps = run.threat.eps * (math.sqrt(math.prod(run.prepared.input_shape)) if run.threat.norm == "linf" else 1.0)
    text += f": images moved by {run.threat} move logits by at most {bounds.change(eps)}"
    if last.slack:
        text += f", {last.slack:.3g} of it by steps of quantized activations and rounding, which no constant bounds"
    return text
