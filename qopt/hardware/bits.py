"""The cost model of storage: what the file really holds, container bits, scales and tables included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from qopt.hardware.cost_model import LayerDescription
from qopt.limits import Limit
from qopt.size import Stored, code_bits, stored_bits, stored_bytes
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class BitsModel:
    """Container bits and bytes. It prices storage only and claims nothing about time or energy."""

    name: str = "bits"

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format can be stored; one with rows, where the layer has as many output channels, and one with blocks,
        where they fill its channels.
        """
        return tuple(spec for spec in formats if _fits(spec, layer))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Code bits and bytes (codes and scales) of one layer."""
        stored = Stored(layer.weights, layer.channels, spec)
        return {"code_bits": float(stored.code_bits), "bytes": float(stored.bytes)}

    def network_cost(self, layers: Sequence[LayerDescription], specs: Mapping[str, WeightSpec]) -> Mapping[str, float]:
        """The two measures of size and the bytes of all weights, shared tables included."""
        stored = [Stored(layer.weights, layer.channels, specs[layer.name]) for layer in layers]
        return {
            "bits": code_bits(stored),
            "stored_bits": stored_bits(stored),
            "size": float(stored_bytes(stored)),
        }

    def limits(self) -> tuple[Limit, ...]:
        """Storage alone sets no limit."""
        return ()


def _fits(spec: WeightSpec, layer: LayerDescription) -> bool:
    if spec.block:
        return layer.weights // layer.channels % spec.block == 0
    return not spec.rows or spec.channels == layer.channels
