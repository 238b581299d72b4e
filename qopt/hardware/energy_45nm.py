"""The cost model of energy on a chip of 45 nm with multipliers as wide as their operands: arithmetic and memory.

Sources: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm,
0.9 V); the ratios of multipliers between 2 and 16 bits from the synthesis results of BitFusion (Sharma et al., ISCA
2018, `results/systolic_array_synth.csv` of its repository, total power of one processing element at 500 MHz); the shift
from ShiftAddNet (You et al., NeurIPS 2020). Eight to four bits save 2.5 times, not 4, and the accumulator stays.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, summed
from qopt.hardware.kernels import by_shifts, fits, integer_levels, parts, weight_bits
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.size import Stored
from qopt.spec import WeightSpec

_HOROWITZ: Final = "Horowitz, ISSCC 2014, figure 1.1.9 (45 nm, 0.9 V)"
_BITFUSION: Final = "BitFusion, results/systolic_array_synth.csv: mW of one fixed-width element at 500 MHz"

INT8_MULTIPLY: Final = Constant(0.2e-12, "J", "published", _HOROWITZ)
INT32_ADD: Final = Constant(0.1e-12, "J", "published", _HOROWITZ)
FLOAT_MULTIPLY: Final = Constant(3.7e-12, "J", "published", _HOROWITZ)
FLOAT_ADD: Final = Constant(0.9e-12, "J", "published", _HOROWITZ)
INT8_SHIFT: Final = Constant(
    0.024e-12,
    "J",
    "assumed",
    "ShiftAddNet's table of unit energies, 45 nm, quoted from memory, not re-read in the paper",
)
SRAM_BIT: Final = Constant(
    20e-12 / 64, "J", "assumed",
    f"{_HOROWITZ}: 20 pJ for 64 bits from a cache of 32 KB, quoted from memory; the 10 pJ of 8 KB were confirmed",
)  # fmt: skip
DRAM_BIT: Final = Constant(
    1.3e-9 / 64, "J", "assumed", f"{_HOROWITZ}: 1.3 to 2.6 nJ for 64 bits, quoted from memory; the lower end"
)
ELEMENT: Final[Mapping[int, Constant]] = {
    2: Constant(31.6e-6 / 500e6, "J", "published", _BITFUSION),
    4: Constant(67.9e-6 / 500e6, "J", "published", _BITFUSION),
    8: Constant(171.8e-6 / 500e6, "J", "published", _BITFUSION),
    16: Constant(542.7e-6 / 500e6, "J", "published", _BITFUSION),
}
"""Energy of one cycle of a processing element whose operands have so many bits: only ratios of it are used."""


@final
@dataclass(frozen=True)
class Energy45nm:
    """Joules of one image: every multiplication and addition, activations from SRAM, every weight once from DRAM."""

    name: ClassVar[str] = "energy-45nm"
    prices: ClassVar[Mapping[str, str]] = units("energy")
    totals: ClassVar[Mapping[str, str]] = units("energy")
    activation_bits: ClassVar[tuple[int, ...]] = (8, 7, 6, 5, 4, 3, 2)
    constants: ClassVar[Mapping[str, Constant]] = {
        "multiply int8": INT8_MULTIPLY, "add int32": INT32_ADD, "multiply float32": FLOAT_MULTIPLY,
        "add float32": FLOAT_ADD, "shift int8": INT8_SHIFT, "SRAM bit": SRAM_BIT, "DRAM bit": DRAM_BIT,
        **{f"element of {bits} bits": constant for bits, constant in ELEMENT.items()},
    }  # fmt: skip

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Every format that the layer's shape allows."""
        return tuple(spec for spec in formats if fits(layer, spec))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Arithmetic of every row in its format, and what is moved."""
        each = sum(share * _mac(row, layer.input_bits) for row, share in parts(spec).items())
        activations = layer.inputs * layer.input_bits + layer.outputs * layer.output_bits
        stored = 8 * Stored(layer.weights, layer.channels, spec).bytes
        return {"energy": layer.macs * each + activations * SRAM_BIT.value + stored * DRAM_BIT.value}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The layers, and the activations that other steps move."""
        rest = sum((step.reads + step.writes) * step.bits for step in steps if not step.layer)
        return {"energy": summed(self, layers, specs)["energy"] + rest * SRAM_BIT.value}

    def limits(self) -> tuple[Limit, ...]:
        """No chip in particular, no limit."""
        return ()


def _mac(spec: WeightSpec, input_bits: int) -> float:
    """One multiply-accumulate: by shift and add where the levels are powers of two, in float where a side is."""
    if input_bits <= 8 and by_shifts(spec):
        scaled = INT8_SHIFT.value * input_bits / 8 if spec.quantizer == "log" else 0.0
        return scaled + INT32_ADD.value
    if input_bits > 8 or not integer_levels(spec):
        return FLOAT_MULTIPLY.value + FLOAT_ADD.value
    return INT8_MULTIPLY.value * _ratio(math.sqrt(weight_bits(spec) * input_bits)) + INT32_ADD.value


def _ratio(bits: float) -> float:
    """A multiplier of ``bits`` bits (of unequal sides the geometric mean) against one of 8, by BitFusion's powers."""
    widths = sorted(ELEMENT)
    high = min(max(bisect_left(widths, bits), 1), len(widths) - 1)
    a, b = widths[high - 1], widths[high]
    slope = math.log(ELEMENT[b].value / ELEMENT[a].value) / math.log(b / a)
    return ELEMENT[a].value / ELEMENT[8].value * math.pow(bits / a, slope)
