"""The cost model of storage: what the file really holds, container bits, scales and tables included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from qopt.hardware.cost_model import Constant, LayerDescription, Step
from qopt.hardware.kernels import fits
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.size import SCALE_BYTES, ZERO_BYTES, Stored, code_bits, stored_bits, stored_bytes
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class BitsModel:
    """Container bits and bytes. It prices storage only and claims nothing about time or energy."""

    name: ClassVar[str] = "bits"
    prices: ClassVar[Mapping[str, str]] = units("code_bits", "bytes")
    totals: ClassVar[Mapping[str, str]] = units("bits", "stored_bits", "size")
    constants: ClassVar[Mapping[str, Constant]] = {
        "scale": Constant(SCALE_BYTES, "B", "measured", "qopt.size, checked against emitted files byte for byte"),
        "zero point": Constant(ZERO_BYTES, "B", "measured", "qopt.size, checked against emitted files byte for byte"),
    }

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format can be stored; one with rows, where the layer has as many output channels, and one with blocks,
        where they fill its channels.
        """
        return tuple(spec for spec in formats if fits(layer, spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Code bits and bytes (codes and scales) of one layer."""
        stored = Stored(layer.weights, layer.channels, spec)
        return {"code_bits": float(stored.code_bits), "bytes": float(stored.bytes)}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Mapping[str, WeightSpec], steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The two measures of size and the bytes of all weights, shared tables included."""
        del steps
        stored = [Stored(layer.weights, layer.channels, specs[layer.name]) for layer in layers]
        return {
            "bits": code_bits(stored),
            "stored_bits": stored_bits(stored),
            "size": float(stored_bytes(stored)),
        }

    def limits(self) -> tuple[Limit, ...]:
        """Storage alone sets no limit."""
        return ()
