"""What a plan became: codes, biases and ranges by name, from which both the quantized twin and the file are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from qopt.graph.model import Prepared
from qopt.quant import AffineRange, AnyWeight, parts_of
from qopt.size import Stored
from qopt.spec import FLOAT, WeightSpec


@final
@dataclass(frozen=True, eq=False)
class Quantized:
    """One quantization of a prepared graph.

    Attributes:
        weights: layer name to its codes; layers that stay float are absent.
        biases: (layer name, use) to the bias float32 (channels,) that replaces the original one.
        activations: ONNX value name to its affine codes; tensors that stay float are absent.
    """

    weights: Mapping[str, AnyWeight] = field(default_factory=dict)
    biases: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    activations: Mapping[str, AffineRange] = field(default_factory=dict)

    def spec(self, layer: str) -> WeightSpec:
        """The format of a layer's weight."""
        return self.weights[layer].spec if layer in self.weights else FLOAT

    def stored(self, prepared: Prepared) -> Iterator[Stored]:
        """Every layer's weight as the file holds it, for `code_bits` and `stored_bits`; rows as one item per format."""
        for layer in prepared.layers:
            stored = Stored(layer.weights, layer.channels, self.spec(layer.name))
            if layer.name not in self.weights:
                yield stored
                continue
            for part, (codes, _) in zip(stored.parts, parts_of(self.weights[layer.name]), strict=True):
                yield replace(part, grid=codes.grid)
