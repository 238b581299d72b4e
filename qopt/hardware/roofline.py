"""Latency as a roofline: a call, then arithmetic or memory, whichever takes longer (Williams et al. 2009)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, container, summed
from qopt.hardware.kernels import fits
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class Kernel:
    """How fast a machine runs one kind of layer.

    Attributes:
        rate: multiply-accumulates in a second.
        bandwidth: bytes in a second between the memory where tensors lie and the arithmetic.
        call: seconds that every call takes besides.
        weight_bits: bits of a weight in memory while the kernel runs, whatever the file stores.
    """

    rate: float
    bandwidth: float
    call: float
    weight_bits: float

    def seconds(self, layer: LayerDescription) -> float:
        """One image through one layer, over all its uses."""
        moved = layer.activation_bytes + layer.weights * layer.uses * self.weight_bits / 8
        return layer.uses * self.call + max(layer.macs / self.rate, moved / self.bandwidth)


class RooflineModel(ABC):
    """Latency on one machine; subclasses say which kernel runs a layer in a format."""

    name: ClassVar[str]
    constants: ClassVar[Mapping[str, Constant]]
    prices: ClassVar[Mapping[str, str]] = units("latency")
    totals: ClassVar[Mapping[str, str]] = units("latency")

    @abstractmethod
    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """What runs the layer in the format."""

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format that the layer's shape allows."""
        return tuple(spec for spec in formats if fits(layer, spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Seconds of one image."""
        return {"latency": self.kernel(layer, spec).seconds(layer)}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The layers one after the other, and every other step by what it moves."""
        return {"latency": summed(self, layers, specs)["latency"] + sum(self.step_seconds(step) for step in steps)}

    def step_seconds(self, step: Step) -> float:
        """A step without weights: bound by memory; 0 for one that a layer is."""
        return 0.0 if step.layer else step.moved_bytes / self.constants["bandwidth"].value

    def limits(self) -> tuple[Limit, ...]:
        """None that this model knows of."""
        return ()


def memory_bits(integer: bool) -> int:
    """Bits of a weight in memory in ONNX Runtime, which unpacks all codes at load (DESIGN 3.8)."""
    return container(8) if integer else 32
