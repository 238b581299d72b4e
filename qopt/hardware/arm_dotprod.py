"""Arm processors with the dot-product extension and ONNX Runtime on one thread: Cortex-A76, as in a Raspberry Pi 5.

SDOT sums four 8-bit products into each 32-bit lane, 16 in one instruction, where FMLA does 4 in float; both issue twice
a cycle on this core. There is no 4-bit product: codes are unpacked to int8 at load and only their file is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription
from qopt.hardware.kernels import on_integers
from qopt.hardware.roofline import Kernel, RooflineModel, memory_bits
from qopt.spec import WeightSpec

_GUIDE: Final = "Arm Cortex-A76 Software Optimization Guide: two ASIMD pipes with a fused multiply-add a cycle each"

CLOCK: Final = Constant(2.4e9, "Hz", "published", "Raspberry Pi 5 (BCM2712) product brief")
FLOAT_MACS: Final = Constant(8, "MAC per cycle", "published", f"{_GUIDE}, 4 lanes")
INT8_MACS: Final = Constant(
    32,
    "MAC per cycle",
    "assumed",
    "16 products of SDOT on each of the two pipes; its entry in the guide was not re-read",
)
SHARE: Final = Constant(0.5, "of the peak", "assumed", "what kernels reach on convolutions; calibrate on the device")
BANDWIDTH: Final = Constant(8e9, "B/s", "assumed", "half of one core's share of LPDDR4X-4267 on 32 lines, 17 GB/s")
CALL: Final = Constant(5e-6, "s", "assumed", "of the order measured for one operator of ONNX Runtime on x86")


@final
@dataclass(frozen=True)
class ArmDotprod(RooflineModel):
    """One Cortex-A76 core."""

    name: ClassVar[str] = "arm-dotprod"
    constants: ClassVar[Mapping[str, Constant]] = {
        "clock": CLOCK, "float": FLOAT_MACS, "int8": INT8_MACS, "share": SHARE, "bandwidth": BANDWIDTH, "call": CALL,
    }  # fmt: skip

    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """Of integers where the layer runs on them, else of float32."""
        integer = on_integers(layer, spec)
        macs = INT8_MACS.value if integer else FLOAT_MACS.value
        return Kernel(macs * CLOCK.value * SHARE.value, BANDWIDTH.value, CALL.value, memory_bits(integer))
