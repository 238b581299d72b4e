"""A weighted layer as integers: rows, biases, multipliers, and the proof that no accumulator overflows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.emit.accumulator import fit_scales, round_bias, smallest_scales
from qopt.emit.biases import bias_of
from qopt.emit.c.fixed_point import multiplier
from qopt.emit.c.steps import Code, LayerStep, Part, Tensor
from qopt.emit.c.values import refuse, window
from qopt.emit.c.weights import Encoded, encode
from qopt.errors import UnsupportedModelError
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange, AnyWeight, QuantizedWeight, parts_of

COLUMN_BYTES = 4096
"""Input columns that are gathered at a time take about so much; a row is unpacked once for all of them."""


class Accumulators:
    """One use of a layer: its weight, fitted to its biases, and what its accumulators hold."""

    def __init__(self, prepared: Prepared, quantized: Quantized, layer: Layer, index: int, code: Code) -> None:
        if layer.name not in quantized.weights:
            raise UnsupportedModelError(
                "the weight is not quantized", where=layer.name, fix="give every layer a format for C code"
            )
        affine = AffineRange(code.scale, code.zero_point, 8)
        bias = bias_of(prepared, layer, index, quantized)
        bias = np.zeros(layer.channels, np.float32) if bias is None else bias
        weight: AnyWeight = quantized.weights[layer.name]
        weight = fit_scales(weight, smallest_scales([(bias, affine)], layer.channels))
        unit = np.broadcast_to(round_bias(bias, weight, affine).unit, bias.shape).astype(np.float64)
        self.layer, self.code = layer, code
        self.parts: list[tuple[QuantizedWeight, NDArray[np.int64], Encoded]] = []
        self.unit, self.bias = unit.copy(), np.zeros(layer.channels, np.int64)
        self.low, self.high = self.bias.copy(), self.bias.copy()
        top = max(code.high, code.zero_point)
        for part, members in parts_of(weight):
            channels = members.numpy()
            rows = encode(part, code.bits, layer.name)
            self.unit[channels] *= rows.unit
            folded = np.rint(bias[channels] / self.unit[channels]).astype(np.int64)
            folded -= code.zero_point * rows.levels.sum(axis=1)
            self.bias[channels] = folded
            products = [top * end(rows.levels, 0).sum(axis=1) for end in (np.minimum, np.maximum)]
            self.low[channels] = np.minimum(folded, 0) + products[0]
            self.high[channels] = np.maximum(folded, 0) + products[1]
            self.parts.append((part, channels, rows))
        self._check()

    @property
    def largest(self) -> float:
        """The largest magnitude of a number that any accumulator stands for."""
        return float((np.maximum(-self.low, self.high) * np.abs(self.unit)).max())

    def _check(self) -> None:
        """Every order of summation, with the bias or before it, stays between all that is negative and all else."""
        worst = int(max(-self.low.min() - 1, self.high.max()))
        if worst >= 1 << 31:
            raise UnsupportedModelError(
                "sums that a 32-bit accumulator does not hold", where=self.layer.name, expected="below 2**31",
                got=str(worst), fix="use fewer bits for its weights or its input",
            )  # fmt: skip

    def multiplied_parts(self, scale: float) -> tuple[Part, ...]:
        """The parts, with what brings their accumulators to codes of ``scale``."""
        return tuple(self._part(part, channels, rows, scale) for part, channels, rows in self.parts)

    def _part(self, part: QuantizedWeight, channels: NDArray[np.int64], rows: Encoded, scale: float) -> Part:
        # a part of counted bits adds (popcount(xnor) + ones - taps), see `dot_xnor`
        ones = (rows.levels > 0).sum(axis=1) - rows.levels.shape[1] if rows.rows == "xnor" else 0
        pairs = np.array([multiplier(unit / scale, self.layer.name) for unit in self.unit[channels]], np.int64)
        return Part(
            str(part.spec), rows.rows, channels, rows.levels, rows.packed, rows.table, rows.bits,
            self.bias[channels] + ones, pairs[:, 0], pairs[:, 1],
        )  # fmt: skip


def layer_step(
    node: ir.Node, sums: Accumulators, source: Tensor, target: Tensor, kernel: tuple[int, ...], macs: int
) -> LayerStep:
    """The step of one use; ``kernel`` is the weight's shape behind its channel axes (convolutions)."""
    layer = sums.layer
    parts = sums.multiplied_parts(target.code.scale)
    taps = parts[0].levels.shape[1]
    if layer.op == "Conv":
        view, _ = window(node, source, kernel, layer.groups)
        pixels, strides = view.pixels, (view.pixels, 1)
    elif layer.op in ("Gemm", "MatMul"):
        view, pixels, strides = None, source.size // taps, (1, layer.channels)
    else:
        raise refuse(node, "is not in C code")
    if view is not None and pixels * layer.channels != target.size:
        raise refuse(node, f"with an output of unexpected shape {target.shape}")
    tile = min(pixels, max(COLUMN_BYTES // taps, 1))
    return LayerStep(
        layer.name, layer.op, source, target, parts, view, layer.groups, taps, pixels, tile, *strides, macs
    )
