"""Observe the second moment of every layer's inputs, the weight of the activation-aware norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from qopt.passes.base import Result
from qopt.passes.nodes import is_layer, op_of
from qopt.passes.watcher import Watcher

MAX_COLUMNS = 4608
"""Layers with longer rows than this are left out: the moment of a row of 4608 takes 170 MB already."""


@final
@dataclass(frozen=True, eq=False)
class ObserveMoments:
    """``C = E[u u^T]`` over images and positions, u the inputs that meet one row of the reshaped weight.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        batch_size: images per run.
        moments: layer name to C, float64 (groups, columns, columns); filled by the pass. Transposed convolutions, and
            layers with rows over MAX_COLUMNS, are absent. A layer with several uses is averaged over all of them.
    """

    images: Tensor
    batch_size: int = 32
    moments: dict[str, Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "observe-moments"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """Observe; the graph stays as it is."""
        watcher = _Moments(graph)
        with torch.no_grad():
            watcher.watch(self.images, self.batch_size)
        self.moments.update({layer: total / watcher.counts[layer] for layer, total in watcher.totals.items()})
        return Result(graph, False, (f"input moments of {len(self.moments)} layers observed",))


class _Moments(Watcher):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        if is_layer(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if op_of(n) == "Conv":
                self._convolution(n.meta["layer"], *args)
            elif op_of(n) != "ConvTranspose" and args[0].shape[-1] <= MAX_COLUMNS:
                self._add(n.meta["layer"], args[0].reshape(1, -1, args[0].shape[-1]))
        return super().run_node(n)

    def _convolution(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, *rest: Any) -> None:
        """``rest`` is padding (before and after, where the two differ), dilation and groups."""
        if weight[0].numel() > MAX_COLUMNS:
            return
        before, after, (dilation, groups) = rest[0], rest[-3], rest[-2:]
        if len(stride) == 1:  # one axis: an image of height 1
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
            stride, before, after, dilation = (1, *stride), (0, *before), (0, *after), (1, *dilation)
        x = functional.pad(x, (before[1], after[1], before[0], after[0]))
        for image in torch.split(x, 1):  # all patches of a batch would take gigabytes
            patches = functional.unfold(image, weight.shape[2:], dilation, 0, stride)
            self._add(layer, patches.reshape(groups, -1, patches.shape[2]).mT)

    def _add(self, layer: str, rows: Tensor) -> None:
        """Take in inputs of shape (groups, positions, columns)."""
        moment = (rows.mT @ rows).double()
        self.totals[layer] = self.totals.get(layer, torch.zeros_like(moment)) + moment
        self.counts[layer] = self.counts.get(layer, 0) + rows.shape[1]
