"""FPGAs with DSP48E2 slices: a Kria KV260 whose slices are all multipliers at 300 MHz.

One slice does two int8 multiplications that share an operand, and four of 4 bits on both sides; wider ones, and float,
take it whole or more. A multiplication by a power of two is a shift, which needs no slice: log, binary and ternary
layers are built of lookup tables beside them, so they are priced by those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription
from qopt.hardware.kernels import by_shifts, on_integers, parts, weight_bits
from qopt.hardware.roofline import Kernel, RooflineModel
from qopt.spec import WeightSpec

_KV260: Final = "AMD Kria K26 data sheet (DS987), Zynq UltraScale+ XCK26"

SLICES: Final = Constant(1248, "DSP48E2", "published", _KV260)
TABLES: Final = Constant(117120, "LUT", "assumed", f"{_KV260}, quoted from memory: no source at hand confirmed it")
CLOCK: Final = Constant(300e6, "Hz", "assumed", "what designs of this size close at")
INT8_PER_SLICE: Final = Constant(
    2, "MAC per cycle", "published", "Xilinx WP486: two int8 MACs in one DSP48E2, one operand shared"
)
INT4_PER_SLICE: Final = Constant(4, "MAC per cycle", "published", "Xilinx WP521: four int4 products in one DSP48E2")
FLOAT_SLICES: Final = Constant(
    4, "DSP48E2 per MAC", "assumed", "single precision: 2 or 3 slices to multiply and 2 to add, by the core's settings"
)
SHIFT_TABLES: Final = Constant(
    40, "LUT per MAC", "assumed", "barrel shift of 8 bits by 8 places and a 24-bit adder, 6-input tables"
)
TABLE_SHARE: Final = Constant(0.5, "of all LUTs", "assumed", "the other half is control, buffers and activations")
BANDWIDTH: Final = Constant(19.2e9, "B/s", "published", f"{_KV260}: DDR4-2400, 64 lines")
CALL: Final = Constant(1e-6, "s", "assumed", "filling and draining the pipeline of a layer")


@final
@dataclass(frozen=True)
class FpgaDsp48e2(RooflineModel):
    """Kria KV260; weights stream from memory in their own width, as they are stored."""

    name: ClassVar[str] = "fpga-dsp48e2"
    activation_bits: ClassVar[tuple[int, ...]] = (8, 4)
    constants: ClassVar[Mapping[str, Constant]] = {
        "slices": SLICES, "tables": TABLES, "clock": CLOCK, "int8": INT8_PER_SLICE, "int4": INT4_PER_SLICE,
        "float": FLOAT_SLICES, "shift": SHIFT_TABLES, "table share": TABLE_SHARE, "bandwidth": BANDWIDTH, "call": CALL,
    }  # fmt: skip

    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """Rows of several formats run one format after the other."""
        cycles = sum(share / self._macs_per_cycle(layer, row) for row, share in parts(spec).items())
        return Kernel(CLOCK.value / cycles, BANDWIDTH.value, CALL.value, spec.container_bits)

    def _macs_per_cycle(self, layer: LayerDescription, spec: WeightSpec) -> float:
        if layer.input_bits <= 8 and by_shifts(spec):
            return TABLES.value * TABLE_SHARE.value / SHIFT_TABLES.value
        if not on_integers(layer, spec):
            return SLICES.value / FLOAT_SLICES.value
        narrow = layer.input_bits <= 4 and weight_bits(spec) <= 4
        return SLICES.value * (INT4_PER_SLICE.value if narrow else INT8_PER_SLICE.value)
