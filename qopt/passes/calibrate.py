"""Observe the range of every marked activation on calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.passes.base import Result
from qopt.passes.watcher import Watcher
from qopt.quant import RangeObserver, calibrated_bounds
from qopt.spec import ActivationSpec


@final
@dataclass(frozen=True, eq=False)
class Calibrate:
    """Run ``images`` through the graph and fill ``observers``; memory is bounded by one batch.

    Attributes:
        images: float32 (n, ...), as the network takes them; whole batches where the graph takes one batch size only.
        batch_size: images per run.
        observers: ONNX value name to what was seen of it, filled by the pass.
    """

    images: Tensor
    batch_size: int = 64
    observers: dict[str, RangeObserver] = field(default_factory=dict)

    name: ClassVar[str] = "calibrate"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, graph: GraphModule) -> Result:
        """Observe; the graph stays as it is.

        Raises:
            DataError: an activation is NaN or infinite, naming it.
        """
        with torch.no_grad():
            _Ranges(graph, self.observers).watch(self.images, self.batch_size)
        return Result(graph, False, (f"ranges observed on {len(self.images)} images",))

    def bounds(self, specs: Mapping[str, ActivationSpec]) -> dict[str, tuple[float, float]]:
        """The ``(low, high)`` that each named value's codes shall cover, by its spec's calibrator."""
        return {name: calibrated_bounds(self.observers[name], spec) for name, spec in specs.items()}


class _Ranges(Watcher):
    def __init__(self, graph: GraphModule, observers: dict[str, RangeObserver]) -> None:
        super().__init__(graph)
        self.observers = observers

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.meta.get("quantize") is not None and n.meta["quantize"] == n.meta["value"]:
            name = n.meta["value"]
            self.observers.setdefault(name, RangeObserver(name)).update(result)
        return result
