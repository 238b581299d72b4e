"""Observe the second moment of every layer's inputs, the weight of the activation-aware norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from qopt.passes.base import Result
from qopt.passes.nodes import is_layer

MAX_COLUMNS = 4608
"""Layers with longer rows than this are left out: their moment would take gigabytes."""


@final
@dataclass(frozen=True, eq=False)
class ObserveMoments:
    """``C = E[u u^T]`` over images and positions, u the inputs that meet one row of the reshaped weight.

    Attributes:
        images: float32 (n, ...), as the network takes them.
        batch_size: images per run.
        moments: layer name to C, float64 (groups, columns, columns); filled by the pass. Layers of operators other
            than convolution and matrix product, and those with rows over MAX_COLUMNS, are absent.
    """

    images: Tensor
    batch_size: int = 32
    moments: dict[str, Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "observe-moments"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """Observe; the graph stays as it is."""
        watcher = _Watcher(graph)
        with torch.no_grad():
            for start in range(0, len(self.images), self.batch_size):
                watcher.run(self.images[start : start + self.batch_size])
        self.moments.update({layer: total / watcher.counts[layer] for layer, total in watcher.totals.items()})
        return Result(graph, False, (f"input moments of {len(self.moments)} layers observed",))


class _Watcher(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        if is_layer(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            rows = _inputs(n, args)
            if rows is not None:
                layer = n.meta["layer"]
                moment = (rows.mT @ rows).double()
                self.totals[layer] = self.totals.get(layer, torch.zeros_like(moment)) + moment
                self.counts[layer] = self.counts.get(layer, 0) + rows.shape[1]
        return super().run_node(n)


def _inputs(node: Node, args: tuple[Any, ...]) -> Tensor | None:
    """The rows of inputs, (groups, positions, columns), or None for an operator without them."""
    x, weight = args[0], args[1]
    if node.target is torch.conv2d:
        if weight[0].numel() > MAX_COLUMNS:
            return None
        _, _, _, stride, padding, dilation, groups = args
        patches = functional.unfold(x, weight.shape[2:], dilation, padding, stride)
        columns = patches.shape[1] // groups
        split: Tensor = patches.reshape(len(x), groups, columns, -1)
        return split.permute(1, 0, 3, 2).reshape(groups, -1, columns)
    if node.meta["op"] in ("Gemm", "MatMul", "Add") and x.shape[-1] <= MAX_COLUMNS:
        return x.reshape(1, -1, x.shape[-1])  # type: ignore[no-any-return]
    return None
