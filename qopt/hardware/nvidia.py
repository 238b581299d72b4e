"""NVIDIA graphics processors with tensor cores at batch 1: T4 (Turing) and A100 (Ampere).

The peaks of float16, int8 and int4 are as 1 to 2 to 4. int4 needs 4-bit codes on both sides and kernels that have it
(TVM's, as HAWQ-v3 used them; CUTLASS). TensorRT and ONNX Runtime have none. With 8-bit activations, the default, 4-bit
weights are priced as int8, and they are smaller in the file only. Measured, int4 is 1.7 times as fast as int8 on
ResNet-18 and 1.55 times on ResNet-50, not twice (HAWQ-v3's latencies on a T4).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

from qopt.hardware.cost_model import Constant, LayerDescription
from qopt.hardware.kernels import on_integers, parts, weight_bits
from qopt.hardware.roofline import Kernel, RooflineModel
from qopt.spec import WeightSpec

_T4: Final = "NVIDIA T4 data sheet"
_A100: Final = "NVIDIA A100 data sheet, dense"

SHARE: Final = Constant(0.3, "of the peak", "assumed", "what single images reach; larger batches reach more")
CALL: Final = Constant(5e-6, "s", "assumed", "one kernel launch")
INT4_GAIN: Final = Constant(
    1.6, "of int8's rate", "published",
    "HAWQ-v3 (Yao et al. 2021), latencies on T4 in its repository: ResNet-18 1.70, ResNet-50 1.55 in all",
)  # fmt: skip


class TensorCores(RooflineModel):
    """A processor by its peaks: operations count a multiplication and an addition as two."""

    activation_bits: ClassVar[tuple[int, ...]] = (8, 4)

    @property
    @abstractmethod
    def peaks(self) -> tuple[float, float, float]:
        """Float16 and int8 operations in a second, and bytes."""

    def kernel(self, layer: LayerDescription, spec: WeightSpec) -> Kernel:
        """Int4 where both sides have 4 bits or fewer, int8 where both are codes, else float16."""
        float16, int8, bandwidth = self.peaks
        rate, bits = float16, 16.0
        if on_integers(layer, spec):
            narrow = layer.input_bits <= 4 and all(weight_bits(row) <= 4 for row in parts(spec))
            rate, bits = (int8 * INT4_GAIN.value, 4.0) if narrow else (int8, 8.0)
        return Kernel(rate / 2 * SHARE.value, bandwidth, CALL.value, bits)


@final
@dataclass(frozen=True)
class NvidiaTuring(TensorCores):
    """T4: 65 TFLOPS in float16, 130 TOPS in int8, 320 GB/s."""

    name: ClassVar[str] = "nvidia-turing"
    constants: ClassVar[Mapping[str, Constant]] = {
        "float16": Constant(65e12, "operations/s", "published", _T4),
        "int8": Constant(130e12, "operations/s", "published", _T4),
        "bandwidth": Constant(320e9, "B/s", "published", _T4), "share": SHARE, "call": CALL, "int4": INT4_GAIN,
    }  # fmt: skip

    @property
    def peaks(self) -> tuple[float, float, float]:
        """Of the data sheet."""
        return self.constants["float16"].value, self.constants["int8"].value, self.constants["bandwidth"].value


@final
@dataclass(frozen=True)
class NvidiaAmpere(TensorCores):
    """A100: 312 TFLOPS in float16, 624 TOPS in int8, 1555 GB/s."""

    name: ClassVar[str] = "nvidia-ampere"
    constants: ClassVar[Mapping[str, Constant]] = {
        "float16": Constant(312e12, "operations/s", "published", _A100),
        "int8": Constant(624e12, "operations/s", "published", _A100),
        "bandwidth": Constant(1555e9, "B/s", "published", f"{_A100}, 40 GB"),
        "share": SHARE, "call": CALL, "int4": Constant(
            INT4_GAIN.value, INT4_GAIN.unit, "assumed", f"as on Turing: {INT4_GAIN.source}"
        ),
    }  # fmt: skip

    @property
    def peaks(self) -> tuple[float, float, float]:
        """Of the data sheet."""
        return self.constants["float16"].value, self.constants["int8"].value, self.constants["bandwidth"].value
