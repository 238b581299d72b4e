"""Let biases absorb the mean shift that quantization causes, layer after layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import Result
from qopt.passes.nodes import bias_source, constant_of, is_convolution, set_bias, weight_source
from qopt.passes.watcher import SideBySide
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
            means = ChannelMeans(self.reference, batches)
            means.run_all()
            corrector = BiasCorrector(graph, batches, means.means)
            corrector.run_all()
        count = corrector.write(self.biases)
        return Result(graph, count > 0, (f"{count} biases corrected",) if count else ())


class ChannelMeans(SideBySide):
    """Observes the mean of every layer's output channels: (layer, use) to float64 (channels,)."""

    def __init__(self, graph: GraphModule, batches: tuple[Tensor, ...]) -> None:
        super().__init__(graph, batches)
        self.means: dict[tuple[str, int], Tensor] = {}

    @final
    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """Take the means; the outputs stay."""
        self.means[node.meta["layer"], node.meta["use"]] = channel_mean(node, outputs)
        return outputs


class BiasCorrector(SideBySide):
    """Runs each layer whose weight is quantized with the bias that restores the means it is given.

    ``means`` may grow while it runs: a layer's must be there when its outputs are.
    """

    def __init__(
        self, graph: GraphModule, batches: tuple[Tensor, ...], means: Mapping[tuple[str, int], Tensor]
    ) -> None:  # fmt: skip
        super().__init__(graph, batches)
        self._graph, self._means = graph, means
        self._changes: list[tuple[Node, Tensor]] = []

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs under the new bias."""
        if weight_source(node).op != "call_module":
            return outputs
        source = bias_source(node)
        old = None if source is None else constant_of(self._graph, source).reshape(-1)  # Gemm may store (1, channels)
        new = corrected_bias(old, self._means[node.meta["layer"], node.meta["use"]], channel_mean(node, outputs))
        self._changes.append((node, new))
        shift = new if old is None else new - old
        return [output + _along_channels(shift, output, node) for output in outputs]

    @final
    def write(self, biases: dict[tuple[str, int], Tensor]) -> int:
        """Put the new biases into the graph and, by (layer, use), into ``biases``; how many they are."""
        for node, bias in self._changes:
            set_bias(self._graph, node, bias)
            biases[node.meta["layer"], node.meta["use"]] = bias
        self._graph.recompile()
        return len(self._changes)


def channel_mean(node: Node, outputs: list[Tensor]) -> Tensor:
    """Mean over batches, images and positions of each output channel: float64 (channels,)."""
    axis = 1 if is_convolution(node) else outputs[0].dim() - 1
    others = [d for d in range(outputs[0].dim()) if d != axis]
    sums = torch.stack([output.sum(others, dtype=torch.float64) for output in outputs])
    return sums.sum(0) / sum(output.numel() // output.shape[axis] for output in outputs)


def _along_channels(shift: Tensor, output: Tensor, node: Node) -> Tensor:
    return shift.reshape(-1, *[1] * (output.dim() - 2)) if is_convolution(node) else shift
