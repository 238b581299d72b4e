"""The contract of a cost model, the plugin group `qopt.cost_models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from qopt.limits import Limit
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class LayerDescription:
    """What a cost model may know of a layer; ``macs`` are multiply-accumulates for one image."""

    name: str
    op: str
    weight_shape: tuple[int, ...]
    channels: int
    weights: int
    macs: int


class CostModel(Protocol):
    """Prices formats. Additive prices go to the solver; `network_cost` has the last word on a whole plan."""

    name: str

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Those of ``formats`` that the hardware and its runtime can take for the layer."""
        ...

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Additive costs of the layer in the format: ``code_bits`` and ``bytes`` at least."""
        ...

    def network_cost(self, layers: Sequence[LayerDescription], specs: Mapping[str, WeightSpec]) -> Mapping[str, float]:
        """Costs of a whole plan: ``bits`` (average code bits), ``stored_bits``, ``size`` (bytes)."""
        ...

    def limits(self) -> tuple[Limit, ...]:
        """Limits of the hardware that every plan must keep."""
        ...
