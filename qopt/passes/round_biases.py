"""Give layers the biases that integer kernels really add."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.fx import GraphModule

from qopt.errors import VerificationError
from qopt.passes.base import Result
from qopt.passes.nodes import is_layer, set_bias


@final
@dataclass(frozen=True, eq=False)
class RoundBiases:
    """Replace biases by their multiples of the accumulator's unit, the weight's scale times the activation's.

    With 8-bit activations the unit is small; with 4-bit ones the rounding moves logits by several percent, and a twin
    without it would disagree with the file on every twentieth image.

    Attributes:
        biases: (layer, use) to what the kernel adds, float32 (channels,).
    """

    biases: Mapping[tuple[str, int], Tensor]

    name: ClassVar[str] = "round-biases"
    tolerance: ClassVar[float] = math.inf

    def __call__(self, graph: GraphModule) -> Result:
        """Replace them.

        Raises:
            VerificationError: no call in the graph is the use of the layer that a bias is for.
        """
        calls = {(n.meta["layer"], n.meta["use"]): n for n in graph.graph.nodes if is_layer(n)}
        missing = sorted(f"{layer} use {use}" for layer, use in set(self.biases) - set(calls))
        if missing:
            raise VerificationError("no call in the graph uses the layer", where=", ".join(missing))
        for key, bias in self.biases.items():
            set_bias(graph, calls[key], bias)
        if self.biases:
            graph.recompile()
        count = len(self.biases)
        return Result(graph, count > 0, (f"{count} biases rounded to the accumulator's unit",) if count else ())
