"""Run one block of a network again and again, under weights that change, and compare it with the float network's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.annotate import ABSORBED
from qopt.passes.blocks import Block
from qopt.passes.nodes import activation_nodes, is_convolution, op_of, weight_chain, weight_source
from qopt.passes.watcher import SideBySide, Watcher
from qopt.quant import AnyWeight


@final
@dataclass(frozen=True, eq=False)
class BlockTarget:
    """For one batch: the numbers that a block puts out, and the means of its layers' output channels."""

    outputs: dict[Node, Tensor]
    means: dict[Node, Tensor]


@final
class BlockRun:
    """A block under any weights, on the inputs that the quantized network gives it.

    Where ``centred``, every layer with codes has the bias that moves its outputs to the target's mean, batch by batch:
    what `BiasCorrector` will do over all images.
    """

    def __init__(
        self, runner: SideBySide, block: Block, targets: list[BlockTarget], trained: set[str], centred: bool
    ) -> None:  # fmt: skip
        self._runner, self._block, self._targets = runner, block, targets
        self._fixed = constants(runner, block.nodes)
        self._chains = {node: weight_chain(node) for node in block.layers if node.meta["layer"] in trained}
        self._centred = {n for n in block.layers if weight_source(n).op == "call_module"} if centred else set()

    def errors(self, codes: Mapping[str, AnyWeight]) -> Tensor:
        """The summed squares over all batches under codes, float64.

        Shape (channels,) for a single layer, with or without a ReLU or Clip: what an output channel is off by depends
        on its own codes only. Shape (1,) for everything else.
        """
        weights = {name: weight.dequantize() for name, weight in codes.items()}
        node, *behind = self._block.nodes
        alone = all(op_of(other) in ABSORBED for other in behind)
        found = torch.zeros(1, dtype=torch.float64)
        for index in range(len(self._targets)):
            for difference in self._differences(index, weights):
                squares = difference.to(torch.float64).square()
                found = found + (squares.sum(_all_but_channels(node, squares)) if alone else squares.sum())
        return found

    def squares(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The summed squares of the differences to the target's outputs, for one batch."""
        return sum((difference.square().sum() for difference in self._differences(index, weights)), torch.zeros(()))

    def _differences(self, index: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        runner, target = self._runner, self._targets[index]
        environment = runner.environments[index]
        values = {**self._fixed, **{node: environment[node] for node in self._block.inputs}}
        runner.env = values
        for node, (source, *between) in self._chains.items():
            values[source] = weights[node.meta["layer"]]
            for step in between:
                values[step] = runner.run_node(step)
        for node in self._block.nodes:
            value = runner.run_node(node)
            if node in self._centred:
                value = value + (target.means[node] - channel_means(node, value))
            values[node] = value
        return [values[node] - wanted for node, wanted in target.outputs.items()]


def constants(runner: Watcher, nodes: Sequence[Node]) -> dict[Node, Any]:
    """The values of everything that ``nodes`` read and that does not depend on the image."""
    assert isinstance(runner.module, GraphModule)
    depends = activation_nodes(runner.module)
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for source in node.all_input_nodes:
            if source not in depends and source not in found:
                visit(source)
                found[source] = None

    for node in nodes:
        visit(node)
    return computed(runner, found, {})


def computed(runner: Watcher, nodes: Iterable[Node], values: dict[Node, Any]) -> dict[Node, Any]:
    """``values`` and those of ``nodes``, run in order."""
    runner.env = values
    for node in nodes:
        values[node] = runner.run_node(node)
    return values


def channel_means(node: Node, output: Tensor) -> Tensor:
    """Mean of a layer's output over all but the channels, every axis kept."""
    return output.mean(_all_but_channels(node, output), keepdim=True)


def _all_but_channels(node: Node, output: Tensor) -> list[int]:
    axis = 1 if is_convolution(node) else output.dim() - 1
    return [d for d in range(output.dim()) if d != axis]
