"""x86 processors with ONNX Runtime on one thread, with and without instructions for 8-bit products.

Codes of fewer than 8 bits and log tables are unpacked to int8 at load (DESIGN 3.8), so they are as fast as int8 and no
faster; what has no integer kernel runs in float. The figures of VNNI are fits to measurements in ONNX Runtime 1.31 on
an AMD EPYC of the Zen 5 class, in context and on channels in multiples of 16; they predicted three residual networks
within 3 % in float and 13 % in int8. For your own machine, `measured:host` calibrates itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription, Step
from qopt.hardware.kernels import on_integers
from qopt.hardware.roofline import Kernel, RooflineModel, memory_bits
from qopt.spec import WeightSpec

_FIT: Final = "roofline fitted to ONNX Runtime 1.31 on an AMD EPYC (Zen 5 class, avx512_vnni), one thread, CPU time"
_INTEL: Final = (
    "Rodriguez et al., Intel 2018, Lower Numerical Precision Deep Learning Inference and Training: vpmaddubsw, "
    "vpmaddwd and vpaddd do 4 times the work of one float FMA in 3 instructions"
)

FLOAT_RATE: Final = Constant(117e9, "MAC/s", "measured", _FIT)
FLOAT_BANDWIDTH: Final = Constant(25e9, "B/s", "measured", _FIT)
FLOAT_CALL: Final = Constant(4.7e-6, "s", "measured", _FIT)
VNNI_RATE: Final = Constant(404e9, "MAC/s", "measured", _FIT)
VNNI_BANDWIDTH: Final = Constant(336e9, "B/s", "measured", f"{_FIT}; the term is hardly ever the larger one")
INTEGER_CALL: Final = Constant(6.6e-6, "s", "measured", _FIT)
AVX2_LANES: Final = Constant(
    0.5, "of AVX-512's", "assumed", "vectors of 256 bits in place of 512, at the same clock and number of units"
)
AVX2_GAIN: Final = Constant(4 / 3, "of float's rate", "published", _INTEL)
AVX2_SAFE_BITS: Final = Constant(
    7, "bit", "measured",
    "DESIGN 3.8: vpmaddubsw saturates pair sums beyond 32767 (microsoft/onnxruntime #14642), 255 * 2 * 64 stays below",
)  # fmt: skip


@final
@dataclass(frozen=True)
class X86Avx512Vnni(RooflineModel):
    """A core with AVX-512 VNNI: 8-bit products are summed in 32 bits by one instruction."""

    name: ClassVar[str] = "x86-avx512-vnni"
    constants: ClassVar[Mapping[str, Constant]] = {
        "float rate": FLOAT_RATE, "float bandwidth": FLOAT_BANDWIDTH, "float call": FLOAT_CALL,
        "int8 rate": VNNI_RATE, "int8 bandwidth": VNNI_BANDWIDTH, "int8 call": INTEGER_CALL,
    }  # fmt: skip

    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """Of integers where the layer runs on them, else of float32."""
        if on_integers(layer, spec):
            return Kernel(VNNI_RATE.value, VNNI_BANDWIDTH.value, INTEGER_CALL.value, memory_bits(True))
        return Kernel(FLOAT_RATE.value, FLOAT_BANDWIDTH.value, FLOAT_CALL.value, memory_bits(False))

    def step_seconds(self, step: Step) -> float:
        """Float tensors move at the rate that was fitted for them."""
        bandwidth = VNNI_BANDWIDTH if step.bits <= 8 else FLOAT_BANDWIDTH
        return 0.0 if step.layer else step.moved_bytes / bandwidth.value


@final
@dataclass(frozen=True)
class X86Avx2(RooflineModel):
    """A core with AVX2 and no VNNI: pairs of products are summed in 16 bits, so weights get 7 bits at most."""

    name: ClassVar[str] = "x86-avx2"
    constants: ClassVar[Mapping[str, Constant]] = {
        "float rate of AVX-512": FLOAT_RATE, "bandwidth": FLOAT_BANDWIDTH, "float call": FLOAT_CALL,
        "int8 call": INTEGER_CALL, "AVX2 against AVX-512": AVX2_LANES, "int8 against float": AVX2_GAIN,
        "widest safe weight": AVX2_SAFE_BITS,
    }  # fmt: skip

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """All whose pair sums cannot saturate; int8 only where the layer runs in float anyway."""
        kept = super().capabilities(layer, formats)
        return tuple(spec for spec in kept if not on_integers(layer, spec) or _safe(spec))

    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """Of integers where the layer runs on them, else of float32."""
        rate = FLOAT_RATE.value * AVX2_LANES.value
        if on_integers(layer, spec):
            return Kernel(rate * AVX2_GAIN.value, FLOAT_BANDWIDTH.value, INTEGER_CALL.value, memory_bits(True))
        return Kernel(rate, FLOAT_BANDWIDTH.value, FLOAT_CALL.value, memory_bits(False))


def _safe(spec: WeightSpec) -> bool:
    if spec.rows:
        return all(_safe(row) for row in spec.row_counts)
    return spec.quantizer != "linear" or spec.bits <= AVX2_SAFE_BITS.value
