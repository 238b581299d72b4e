"""The cost model of bit operations: multiply-accumulates times the bits of both sides.

A count, not a cost: it overstates what few bits save (8 to 4 bits save 2.5 times the energy of a multiplier, not 4;
`energy-45nm` has those figures). It is what HAWQ-v3 and most papers report, so plans can be compared by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, summed
from qopt.hardware.kernels import fits, parts, weight_bits
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class BopsModel:
    """``BOPs = MACs * bits of a weight * bits of an activation`` (Yao et al. 2021, HAWQ-v3, section 4)."""

    name: ClassVar[str] = "bops"
    prices: ClassVar[Mapping[str, str]] = units("bops")
    totals: ClassVar[Mapping[str, str]] = units("bops")
    activation_bits: ClassVar[tuple[int, ...]] = (8, 7, 6, 5, 4, 3, 2)
    constants: ClassVar[Mapping[str, Constant]] = {}

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format that the layer's shape allows."""
        return tuple(spec for spec in formats if fits(layer, spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Bit operations for one image; rows count by their own bits."""
        bits = sum(share * weight_bits(row) for row, share in parts(spec).items())
        return {"bops": float(layer.macs * bits * layer.input_bits)}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """Their sum; steps without weights count nothing."""
        del steps
        return summed(self, layers, specs)

    def limits(self) -> tuple[Limit, ...]:
        """A count sets no limit."""
        return ()
