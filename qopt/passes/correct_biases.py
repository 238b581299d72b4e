"""Let biases absorb the mean shift that quantization causes, layer after layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import Result
from qopt.passes.nodes import bias_source, constant_of, is_convolution, is_layer, set_bias, weight_source
from qopt.passes.watcher import Watcher
from qopt.quant import corrected_bias


@final
@dataclass(frozen=True, eq=False)
class CorrectBiases:
    """Sequential bias correction: each layer sees the activations of the quantized layers before it.

    After it, the mean of every output channel of every layer whose weight is quantized equals the float network's over
    ``images``. All activations of one layer are in memory at once.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        reference: the float graph with the same layers.
        batch_size: images per run.
        biases: (layer, use) to its new bias float32 (channels,), filled by the pass.
    """

    images: Tensor
    reference: GraphModule
    batch_size: int = 64
    biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "correct-biases"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Change the bias of every layer whose weight is quantized."""
        batches = torch.split(self.images, self.batch_size)
        with torch.no_grad():
            means = _Means(self.reference)
            means.side_by_side(batches)
            corrector = _Corrector(graph, means.means, self.biases)
            corrector.side_by_side(batches)
        for node, bias in corrector.changes:
            set_bias(graph, node, bias)
        graph.recompile()
        count = len(corrector.changes)
        return Result(graph, count > 0, (f"{count} biases corrected",) if count else ())


class _SideBySide(Watcher):
    """Runs several batches node by node, so that a layer's mean over all of them is known before the next layer."""

    def side_by_side(self, batches: tuple[Tensor, ...]) -> None:
        """Run them; `layer` may change what a layer returns."""
        environments: list[dict[Node, Any]] = [{} for _ in batches]
        for node in self.graph.nodes:
            results = []
            for environment, batch in zip(environments, batches, strict=True):
                self.env, self.args_iter = environment, iter((batch,))
                results.append(self.run_node(node))
            if is_layer(node):
                results = self.layer(node, results)
            for environment, result in zip(environments, results, strict=True):
                environment[node] = result
                for done in self.user_to_last_uses.get(node, []):
                    del environment[done]

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """Called with a layer's outputs on all batches; returns what the nodes after it see."""
        raise NotImplementedError


class _Means(_SideBySide):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.means: dict[tuple[str, int], Tensor] = {}

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        self.means[node.meta["layer"], node.meta["use"]] = channel_mean(node, outputs)
        return outputs


class _Corrector(_SideBySide):
    def __init__(
        self, graph: GraphModule, means: dict[tuple[str, int], Tensor], biases: dict[tuple[str, int], Tensor]
    ) -> None:
        super().__init__(graph)
        self.owner, self.means, self.biases = graph, means, biases
        self.changes: list[tuple[Node, Tensor]] = []

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        if weight_source(node).op != "call_module":
            return outputs
        source = bias_source(node)
        old = None if source is None else constant_of(self.owner, source).reshape(-1)  # Gemm may store (1, channels)
        key = (node.meta["layer"], node.meta["use"])
        new = corrected_bias(old, self.means[key], channel_mean(node, outputs))
        self.biases[key] = new
        self.changes.append((node, new))
        shift = new if old is None else new - old
        return [output + _along_channels(shift, output, node) for output in outputs]


def channel_mean(node: Node, outputs: list[Tensor]) -> Tensor:
    """Mean over batches, images and positions of each output channel: float64 (channels,)."""
    axis = 1 if is_convolution(node) else outputs[0].dim() - 1
    others = [d for d in range(outputs[0].dim()) if d != axis]
    sums = torch.stack([output.sum(others, dtype=torch.float64) for output in outputs])
    return sums.sum(0) / sum(output.numel() // output.shape[axis] for output in outputs)


def _along_channels(shift: Tensor, output: Tensor, node: Node) -> Tensor:
    return shift.reshape(-1, *[1] * (output.dim() - 2)) if is_convolution(node) else shift
