"""Put a fake quantizer after every activation that has a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch.fx import GraphModule, Node

from qopt.errors import VerificationError
from qopt.graph.operators.quantization import quantized, quantized_by_own_range
from qopt.passes.base import Result
from qopt.passes.nodes import free_name
from qopt.quant import ActivationQuantizer, AffineRange, Gradient


@final
@dataclass(frozen=True, eq=False)
class InsertActivationQuantizers:
    """Quantize the named ONNX values, per tensor.

    Attributes:
        ranges: value name to its affine codes.
        gradient: how a gradient passes the rounding: ``ste`` (straight through inside the range), ``bpda`` (straight
            through everywhere) or ``plain`` (the derivative of round: zero).
    """

    ranges: Mapping[str, AffineRange]
    gradient: Gradient = "ste"

    name: ClassVar[str] = "insert-activation-quantizers"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Insert them.

        Raises:
            VerificationError: a value that has a range is not in the graph.
        """
        placed: set[str] = set()
        for node in list(graph.graph.nodes):
            value = node.meta.get("value")
            if "quantize" not in node.meta or value not in self.ranges:
                continue
            module = free_name(graph, f"{node.name}_quantizer")
            graph.add_submodule(module, ActivationQuantizer(self.ranges[value], self.gradient))
            with graph.graph.inserting_after(node):
                call = graph.graph.call_module(module, (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
            placed.add(value)
        missing = sorted(set(self.ranges) - placed)
        if missing:
            raise VerificationError("no marked node of the graph computes the value", where=", ".join(missing))
        if placed:
            graph.recompile()
        return Result(graph, bool(placed), (f"{len(placed)} activations quantized",) if placed else ())


def set_gradient(graph: GraphModule, gradient: Gradient) -> None:
    """Switch how gradients pass every activation quantizer of the graph, those that a file came with included."""
    for module in graph.modules():
        if isinstance(module, ActivationQuantizer):
            module.gradient = gradient
    for node in _imported(graph):
        node.update_kwarg("gradient", gradient)
    graph.recompile()


def quantizes_activations(graph: GraphModule) -> bool:
    """Whether gradients meet a quantizer at all: what `set_gradient` changes."""
    return bool(_imported(graph)) or any(isinstance(module, ActivationQuantizer) for module in graph.modules())


def _imported(graph: GraphModule) -> list[Node]:
    """QuantizeLinear and DynamicQuantizeLinear nodes of the file that the twin was built from."""
    return [node for node in graph.graph.nodes if node.target in (quantized, quantized_by_own_range)]
