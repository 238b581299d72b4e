"""Replace float weights by codes and a dequantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qopt.errors import VerificationError
from qopt.passes.base import Result
from qopt.passes.nodes import free_name, weight_source
from qopt.quant import AnyWeight


@final
class WeightQuantizer(nn.Module):
    """Holds the codes; ``forward`` gives the float32 weight that the emitted file computes."""

    def __init__(self, weight: AnyWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return self.weight.dequantize()


@final
@dataclass(frozen=True, eq=False)
class InsertWeightQuantizers:
    """Give every layer in ``weights`` a `WeightQuantizer`; layers without an entry stay float."""

    weights: Mapping[str, AnyWeight]

    name: ClassVar[str] = "insert-weight-quantizers"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Insert them.

        Raises:
            VerificationError: a layer to be quantized has no call in the graph.
        """
        modules: dict[str, str] = {}
        for node in list(graph.graph.nodes):
            layer = node.meta.get("layer")
            if layer in self.weights:
                _insert(graph, node, layer, self.weights[layer], modules)
        missing = sorted(set(self.weights) - set(modules))
        if missing:
            raise VerificationError("no call in the graph uses the layer", where=", ".join(missing))
        if modules:
            graph.graph.eliminate_dead_code()
            graph.delete_all_unused_submodules()
            graph.recompile()
        return Result(graph, bool(modules), (f"{len(modules)} weights quantized",) if modules else ())


def _insert(graph: GraphModule, node: Node, layer: str, weight: AnyWeight, modules: dict[str, str]) -> None:
    source = weight_source(node)
    if layer not in modules:
        modules[layer] = free_name(graph, f"{source.name}_quantizer")
        graph.add_submodule(modules[layer], WeightQuantizer(weight))
    with graph.graph.inserting_before(source):
        call = graph.graph.call_module(modules[layer])
    call.meta.update(source.meta)
    source.replace_all_uses_with(call)
