"""The largest sums of two products that an integer kernel without VNNI adds in 16 bits.

x86 before AVX512-VNNI multiplies unsigned activation codes by signed weight codes with VPMADDUBSW, which adds two
neighbouring products along the reduction and saturates silently at 32767 (microsoft/onnxruntime #14642, #12072). The
kernels of ONNX Runtime pair the 1st with the 2nd, the 3rd with the 4th, and so on; the reduction of a convolution runs
over places first and input channels last (`ReorderFilter` of its QLinearConv). Depthwise convolutions widen to 16 bits
before they multiply, and 32-bit kernels add nothing in pairs.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from qopt.emit.integer import integer_parts
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AnyWeight, parts_of

SATURATES: Final = 32767
"""The largest sum of two products that 16 bits hold."""


def worst_pair_sums(prepared: Prepared, quantized: Quantized) -> dict[str, int]:
    """Layer to its worst pair sum, for every layer on an integer kernel that adds in pairs."""
    found = {}
    for name, part in integer_parts(prepared, quantized).items():
        layer = prepared.layer(name)
        if not _depthwise(layer):
            largest = max(quantized.activations[use.input].largest_code for use in layer.uses)
            found[name] = worst_pair_sum(reduction_rows(part.weight, layer), largest)
    return found


def worst_pair_sum(rows: NDArray[np.int64], largest: int) -> int:
    """The largest |sum of two products| of neighbours in ``rows`` (n, k) with codes from 0 to ``largest``.

    Activations are chosen against the weights: ``largest`` where the sign fits, else 0.
    """
    count, width = rows.shape
    pairs = np.pad(rows, ((0, 0), (0, width % 2))).reshape(count, -1, 2)
    above, below = np.maximum(pairs, 0).sum(axis=2), np.minimum(pairs, 0).sum(axis=2)
    return int(largest * max(above.max(), -below.min()))


def reduction_rows(weight: AnyWeight, layer: Layer) -> NDArray[np.int64]:
    """The integer levels, int64 (channels, k), in the order in which the kernel adds their products."""
    levels = np.moveaxis(integer_levels(weight), layer.channel_axis, 0)
    if layer.op == "Conv":
        levels = np.moveaxis(levels, 1, -1)
    return levels.reshape(len(levels), -1)


def integer_levels(weight: AnyWeight) -> NDArray[np.int64]:
    """What multiplies the scale, int64 in the shape of the weight; codes themselves for an asymmetric format."""
    levels = np.empty(tuple(weight.shape), np.int64)
    rows = np.moveaxis(levels, weight.axis, 0)
    for part, members in parts_of(weight):
        codes = part.codes.numpy().astype(np.int64)
        values = codes if part.table is None else part.table.numpy().astype(np.int64)[codes]
        rows[members.numpy()] = np.moveaxis(values, weight.axis, 0)
    return levels


def _depthwise(layer: Layer) -> bool:
    return layer.op == "Conv" and layer.groups == layer.channels and layer.shape[1] == 1
