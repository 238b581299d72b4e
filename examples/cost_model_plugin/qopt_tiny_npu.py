"""A cost model for a made-up accelerator: what a plugin for real hardware looks like, in one file.

The device multiplies 4-bit weights by 8-bit activations twice as fast as 8-bit weights, reads weights from 64 KB of
its own memory, and knows linear formats with one scale per channel only. While a layer runs, its weights lie beside the
activations in a scratchpad, which ``--limit "sram<=..."`` bounds at every step. Nothing else runs on it: layers on
float activations are not taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, StepMemory, summed
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.size import Stored
from qopt.spec import WeightSpec

SHEET = "Tiny NPU data sheet, table 3 (made up for this example)"


@dataclass(frozen=True)
class TinyNpu:
    """64 multipliers at 100 MHz; frozen, so that it compares and hashes by value."""

    name: ClassVar[str] = "tiny-npu"
    prices: ClassVar[Mapping[str, str]] = units("latency", "energy", "flash")
    totals: ClassVar[Mapping[str, str]] = units("latency", "energy", "flash", "sram")
    constants: ClassVar[Mapping[str, Constant]] = {
        "clock": Constant(100e6, "Hz", "published", SHEET),
        "multipliers": Constant(64, "MAC per cycle at 8 bits", "published", SHEET),
        "power": Constant(0.05, "W", "measured", "shunt resistor on a board (made up for this example)"),
        "start": Constant(200, "cycles per layer", "assumed", "writing the registers of one layer"),
        "memory": Constant(64 * 1024, "B", "published", SHEET),
    }

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """int4 and int8 with a scale per channel, behind 8-bit activations."""
        taken = layer.input_bits <= 8 and layer.op in ("Conv", "Gemm", "MatMul")
        return tuple(spec for spec in formats if taken and str(spec).split(":")[0] in ("int4", "int8") and plain(spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Seconds and joules of one image, bytes of weights in the units of `qopt.hardware.quantities`."""
        rate = self.constants["multipliers"].value * (2 if spec.bits <= 4 else 1)
        cycles = self.constants["start"].value * layer.uses + layer.macs / rate
        seconds = cycles / self.constants["clock"].value
        stored = Stored(layer.weights, layer.channels, spec)
        return {"latency": seconds, "energy": seconds * self.constants["power"].value, "flash": float(stored.bytes)}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The layers one after the other; additions and pools run beside them and take no time."""
        taken = {layer.name: self.weight_memory(layer, specs[layer.name]) for layer in layers}
        rows = self.step_memory(layers, steps)
        peak = max((row.base + sum(taken[name] for name in row.layers) for row in rows), default=0.0)
        return {**summed(self, layers, specs), "sram": peak}

    def weight_memory(self, layer: LayerDescription, spec: WeightSpec) -> float:
        """Bytes of a layer's weights in the scratchpad; optional, as `step_memory` is."""
        return float(Stored(layer.weights, layer.channels, spec).bytes)

    def step_memory(self, layers: Sequence[LayerDescription], steps: Sequence[Step]) -> tuple[StepMemory, ...]:
        """At every step the live activations, and the weights of the layer that it is."""
        known = {layer.name for layer in layers}
        return tuple(StepMemory(s.name, float(s.bytes), tuple({s.layer} & known)) for s in steps)

    def limits(self) -> tuple[Limit, ...]:
        """Weights must fit its memory."""
        return (Limit("flash", self.constants["memory"].value),)


def plain(spec: WeightSpec) -> bool:
    """Whether a format has one scale per channel and no zero points."""
    return spec.granularity == "channel" and not spec.asymmetric
