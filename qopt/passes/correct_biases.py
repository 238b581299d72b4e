"""Let biases absorb the mean shift that quantization causes, layer after layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qopt.passes.base import Result
from qopt.passes.nodes import bias_source, constant_of, is_layer, op_of, weight_source
from qopt.quant import corrected_bias


@final
@dataclass(frozen=True, eq=False)
class CorrectBiases:
    """Sequential bias correction: each layer sees the activations of the quantized layers before it.

    After it, the mean of every layer's output channel over ``images`` equals the float network's.

    Attributes:
        images: float32 (n, ...), all run at once.
        reference: the float graph with the same layers.
        biases: (layer, use) to its new bias float32 (channels,), filled by the pass.
    """

    images: Tensor
    reference: GraphModule
    biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "correct-biases"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Change the bias of every layer whose weight is quantized."""
        with torch.no_grad():
            means = _Means(self.reference)
            means.run(self.images)
            corrector = _Corrector(graph, means.means, self.biases)
            corrector.run(self.images)
        for node, bias in corrector.changes:
            _set_bias(graph, node, bias)
        graph.recompile()
        return Result(graph, bool(self.biases), (f"{len(self.biases)} biases corrected",) if self.biases else ())


def channel_mean(output: Tensor, node: Node) -> Tensor:
    """Mean over images and positions of each output channel: (channels,)."""
    axis = 1 if _is_convolution(node) else output.dim() - 1
    return output.double().mean([d for d in range(output.dim()) if d != axis])


def _is_convolution(node: Node) -> bool:
    return op_of(node) in ("Conv", "ConvTranspose")


class _Means(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.means: dict[tuple[str, int], Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if is_layer(n):
            self.means[n.meta["layer"], n.meta["use"]] = channel_mean(result, n)
        return result


class _Corrector(Interpreter):
    def __init__(
        self, graph: GraphModule, means: dict[tuple[str, int], Tensor], biases: dict[tuple[str, int], Tensor]
    ) -> None:
        super().__init__(graph)
        self.owner, self.means, self.biases = graph, means, biases
        self.changes: list[tuple[Node, Tensor]] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if not is_layer(n) or weight_source(n).op != "call_module":
            return result
        source = bias_source(n)
        old = None if source is None else constant_of(self.owner, source)
        key = (n.meta["layer"], n.meta["use"])
        new = corrected_bias(old, self.means[key], channel_mean(result, n)).float()
        self.biases[key] = new
        self.changes.append((n, new))
        shift = new if old is None else new - old
        return result + (shift.reshape(-1, *[1] * (result.dim() - 2)) if _is_convolution(n) else shift)


def _set_bias(graph: GraphModule, node: Node, bias: Tensor) -> None:
    name = f"{node.name}_bias_corrected"
    graph.register_buffer(name, bias)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
    node.update_arg(2, constant) if len(node.args) > 2 else node.insert_arg(2, constant)
