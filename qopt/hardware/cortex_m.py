"""Microcontrollers that run the C program of `--emit c` or CMSIS-NN: Cortex-M4 (STM32F469) and Cortex-M7 (STM32H743).

There is no arithmetic below 16 bits: int8 is widened to pairs of int16 for SMLAD, and narrower codes are unpacked to
int8 before that. So int4, log and ternary weights save flash, and cost as much time as int8 and the unpacking besides.
A multiplication takes one cycle as a shift does: shift-add is no faster, and is priced as the same.

SRAM is what is live at once, by the steps of the network; the program of `--emit c` needs some scratch memory besides,
which its own arena counts exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, peak, summed
from qopt.hardware.kernels import fits, on_integers
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.size import Stored
from qopt.spec import WeightSpec

_C: Final = "qopt.emit.c: int32 bias, int32 mantissa and uint8 shift of every output channel"

CHANNEL_BYTES: Final = Constant(9, "B", "measured", _C)
LAYER_BYTES: Final = Constant(100, "B", "measured", "qopt.emit.c.program: some 100 bytes describe a layer")
PROGRAM_BYTES: Final = Constant(16 * 1024, "B", "assumed", "kernels of the emitted C, compiled for Thumb-2")
UNPACK_CYCLES: Final = Constant(
    2, "cycles per weight", "assumed", "shift, mask and table of one narrow code, once per tile of columns"
)
TILE: Final = Constant(16, "positions", "assumed", "output positions that share one unpacked row")
MOVE_CYCLES: Final = Constant(4, "cycles per element", "assumed", "load, requantize and store of steps without weights")
CMSIS_M7: Final = Constant(
    1.73, "cycles per MAC", "assumed",
    "24.7 MOps (Lai et al. 2018, arXiv 1801.06601, CIFAR-10 network, CMSIS-NN) in 99.1 ms at 216 MHz; the time is "
    "quoted from memory, not re-read in the paper",
)  # fmt: skip
CMSIS_M4: Final = Constant(
    5.0, "cycles per MAC", "assumed",
    "the middle of 3 to 7: MLPerf Tiny v0.5 has 6.8 (ResNet-8, L4R5ZI at 120 MHz, reference kernels)",
)  # fmt: skip
FLOAT_M4: Final = Constant(9.0, "cycles per MAC", "assumed", "two loads and VMLA.F32, which takes 3 cycles")
FLOAT_M7: Final = Constant(5.0, "cycles per MAC", "assumed", "the same, two issued at once where they can be")


class CortexM:
    """A microcontroller: latency by cycles, flash as the C program stores weights, SRAM by liveness."""

    name: ClassVar[str]
    prices: ClassVar[Mapping[str, str]] = units("latency", "flash")
    totals: ClassVar[Mapping[str, str]] = units("latency", "flash", "sram")
    constants: ClassVar[Mapping[str, Constant]]

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """Behind codes what the C program has integers for; in float whatever the layer's shape allows."""
        return tuple(spec for spec in formats if fits(layer, spec) and (layer.input_bits > 8 or _in_c(layer, spec)))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Seconds of one image, and bytes of flash."""
        integer = layer.input_bits <= 8 and _in_c(layer, spec)
        cycles = layer.macs * self.constants["int8" if integer else "float"].value
        if integer and spec.container_bits < 8:
            unpacked = layer.weights * layer.uses * ceil(layer.positions / layer.uses / TILE.value)
            cycles += unpacked * UNPACK_CYCLES.value
        return {"latency": cycles / self.constants["clock"].value, "flash": float(_flash(layer, spec))}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The layers, the elements that other steps move, the program's code, and the most that is live at once."""
        found = summed(self, layers, specs)
        moved = sum(step.reads + step.writes for step in steps if not step.layer)
        found["latency"] += moved * MOVE_CYCLES.value / self.constants["clock"].value
        found["flash"] += PROGRAM_BYTES.value
        widest = peak(steps)
        return {**found, "sram": float(widest.bytes if widest else 0)}

    def limits(self) -> tuple[Limit, ...]:
        """The part's flash and SRAM."""
        return Limit("flash", self.constants["flash"].value), Limit("sram", self.constants["sram"].value)


def _in_c(layer: LayerDescription, spec: WeightSpec) -> bool:
    """Whether the C program multiplies by the format: on integers, or by the shifts of any log format."""
    return on_integers(layer, spec) or (layer.op in ("Conv", "Gemm", "MatMul") and spec.quantizer == "log")


def _flash(layer: LayerDescription, spec: WeightSpec) -> int:
    """As the C program stores it: every row begins at a byte, scales are folded into the requantization."""
    if spec.is_float:
        return 4 * layer.weights
    rows = sum(
        part.channels * ceil(part.spec.container_bits * layer.taps / 8)
        for part in Stored(layer.weights, layer.channels, spec).parts
    )
    return rows + layer.channels * int(CHANNEL_BYTES.value) + int(LAYER_BYTES.value)


_SHARED: Final = {
    "bytes of a channel": CHANNEL_BYTES, "bytes of a layer": LAYER_BYTES, "bytes of code": PROGRAM_BYTES,
    "unpacking": UNPACK_CYCLES, "tile": TILE, "moving": MOVE_CYCLES,
}  # fmt: skip


@final
@dataclass(frozen=True)
class Stm32F4(CortexM):
    """STM32F469: Cortex-M4 at 180 MHz, 2 MB of flash, 160 + 32 + 128 KB of SRAM and 64 KB beside the core."""

    name: ClassVar[str] = "stm32f4"
    constants: ClassVar[Mapping[str, Constant]] = {
        "clock": Constant(180e6, "Hz", "published", "STM32F469xx data sheet (DS11189)"),
        "flash": Constant(2 * 1024**2, "B", "published", "STM32F469xx data sheet (DS11189), the I suffix"),
        "sram": Constant(384 * 1024, "B", "published", "ST RM0386, section 2.1: SRAM1 to SRAM3 (320 KB) and CCM"),
        "int8": CMSIS_M4, "float": FLOAT_M4, **_SHARED,
    }  # fmt: skip


@final
@dataclass(frozen=True)
class CortexM7(CortexM):
    """STM32H743: Cortex-M7 at 480 MHz, 2 MB of flash, 1 MB of SRAM."""

    name: ClassVar[str] = "cortex-m7"
    constants: ClassVar[Mapping[str, Constant]] = {
        "clock": Constant(480e6, "Hz", "published", "STM32H743xI data sheet (DS12110)"),
        "flash": Constant(2 * 1024**2, "B", "published", "STM32H743xI data sheet (DS12110)"),
        "sram": Constant(1024**2, "B", "published", "STM32H743xI data sheet (DS12110): 1 MB in all of its memories"),
        "int8": CMSIS_M7, "float": FLOAT_M7, **_SHARED,
    }  # fmt: skip
