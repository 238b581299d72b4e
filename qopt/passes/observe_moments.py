"""Observe the second moment of every layer's inputs, the weight of the activation-aware norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import Result
from qopt.passes.layer_inputs import InputMoment, has_rows, input_rows
from qopt.passes.nodes import is_layer
from qopt.passes.watcher import Watcher


@final
@dataclass(frozen=True, eq=False)
class ObserveMoments:
    """``C = E[u u^T]`` over images and positions, u the inputs that meet one row of the reshaped weight.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        batch_size: images per run.
        centred: observe covariances, what is left where a bias absorbs the mean.
        moments: layer name to C, float64 (groups, columns, columns); filled by the pass. Transposed convolutions, and
            layers with rows over `MAX_COLUMNS`, are absent. A layer with several uses is averaged over all of them.
    """

    images: Tensor
    batch_size: int = 32
    centred: bool = False
    moments: dict[str, Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "observe-moments"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """Observe; the graph stays as it is."""
        watcher = _Moments(graph)
        with torch.no_grad():
            watcher.watch(self.images, self.batch_size)
        self.moments.update(
            {layer: found.covariance if self.centred else found.moment for layer, found in watcher.found.items()}
        )
        return Result(graph, False, (f"input moments of {len(self.moments)} layers observed",))


class _Moments(Watcher):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, InputMoment] = {}

    def run_node(self, n: Node) -> Any:
        if is_layer(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if has_rows(n, args):
                moment = self.found.setdefault(n.meta["layer"], InputMoment())
                for rows in input_rows(n, args):
                    moment.add(rows)
        return super().run_node(n)
