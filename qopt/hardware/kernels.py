"""What a format is when it runs: on integer kernels or in float, by multiplication or by shifts, how many bits wide."""

from __future__ import annotations

from qopt.hardware.cost_model import FLOAT_BITS, LayerDescription
from qopt.spec import WeightSpec

MOST_TABLE_BITS = 4
"""Log formats and plugins beyond it have levels that no int8 holds."""


def integer_levels(spec: WeightSpec) -> bool:
    """Whether int8 holds every level of the format, so that integer kernels take it (DESIGN 3.8)."""
    if spec.rows:
        return all(integer_levels(row) for row in spec.row_counts)
    if spec.is_float or spec.asymmetric or spec.granularity == "block":
        return False
    return spec.quantizer in ("linear", "binary", "ternary") or spec.bits <= MOST_TABLE_BITS


def on_integers(layer: LayerDescription, spec: WeightSpec) -> bool:
    """Whether the layer runs on integer kernels in ONNX Runtime and other stock runtimes: codes on both sides.

    Other layers compute in float, whatever the file stores.
    """
    return layer.input_bits <= 8 and layer.op in ("Conv", "Gemm", "MatMul") and integer_levels(spec)


def by_shifts(spec: WeightSpec) -> bool:
    """Whether a multiplication by a level is a shift, a change of sign or nothing: log, binary and ternary weights."""
    if spec.rows:
        return all(by_shifts(row) for row in spec.row_counts)
    return spec.quantizer in ("log", "binary", "ternary")


def parts(spec: WeightSpec) -> dict[WeightSpec, float]:
    """The formats of the output channels and which share of them has each."""
    return {row: count / spec.channels for row, count in spec.row_counts.items()} if spec.rows else {spec: 1.0}


def weight_bits(spec: WeightSpec) -> int:
    """Bits of one code in arithmetic: 32 for float, 2 for ternary."""
    return FLOAT_BITS if spec.is_float else spec.bits


def fits(layer: LayerDescription, spec: WeightSpec) -> bool:
    """Whether a layer of this shape can have the format: as many rows as channels, blocks that fill them."""
    if spec.block:
        return layer.taps % spec.block == 0
    return not spec.rows or spec.channels == layer.channels
