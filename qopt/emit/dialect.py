"""How a quantized weight is written down.

``folding`` is what `qopt.runtime.patterns` describes: the fewest bytes on disk, nothing left of it at run time.
``qdq`` is what other tools and compilers read: one initializer of codes straight into a DequantizeLinear. What its
containers are:

| levels of the weight | initializer | zero point |
|---|---|---|
| -8 to 7: linear formats up to 4 bits, ternary, 2- and 3-bit mid-rise, rows of these | INT4 | none |
| all other integers: 5 to 8 bits, log formats and mid-rise up to 4 bits, rows of these | INT8 | none |
| asymmetric, up to 4 bits | UINT4 | UINT4 |
| asymmetric, 5 to 8 bits | UINT8 | UINT8 |

Scales per block become ``block_size`` along the columns of a matrix, from (channels, columns) by Reshape, and Transpose
where channels are not first, for any other shape. Log formats above 4 bits have float levels, which no such initializer
holds: they are refused. A Gemm on integer kernels gets its zero points written out, without which it does not fuse.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.config import Dialect
from qopt.emit.integer import integer_parts
from qopt.emit.pair_sums import integer_levels
from qopt.errors import PlanError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AnyWeight, QuantizedWeight, parts_of
from qopt.runtime.patterns import Subgraph, float_weight, integer_weight

_SMALL: Final = (-8, 7)
"""What four bits hold."""


def folding_weight(layer: str, weight: AnyWeight, *, integer: bool, gemm: bool) -> tuple[Subgraph, ir.Value]:
    """The weight in the dialect ``folding``: as int8 levels for an integer kernel, else as float ones."""
    return integer_weight(layer, weight, zero_points=gemm) if integer else float_weight(layer, weight)


def qdq_weight(layer: str, weight: AnyWeight, *, integer: bool, gemm: bool) -> tuple[Subgraph, ir.Value]:
    """The weight in the dialect ``qdq``; ``gemm`` only counts for an ``integer`` kernel.

    Raises:
        PlanError: float levels.
    """
    graph = Subgraph(layer)
    codes, zero = _container(layer, weight)
    scale = np.asarray(weight.scale.numpy())
    if scale.ndim == 2:
        return graph, _blocked(graph, weight, codes, zero)
    inputs = [graph.constant("codes", codes), graph.constant("scale", scale)]
    if zero is not None:
        inputs.append(graph.constant("zero", zero))
    elif integer and gemm:
        inputs.append(graph.constant("zero", np.zeros(scale.shape, np.int8).astype(codes.dtype)))
    axis = {"axis": weight.axis} if scale.ndim else {}
    return graph, graph.node("DequantizeLinear", inputs, "dequantized", **axis)


def fused_layers(prepared: Prepared, quantized: Quantized, dialect: Dialect) -> frozenset[str]:
    """The layers of `integer_layers` that ONNX Runtime runs on integer kernels as ``dialect`` writes them.

    Of ``qdq`` those in 8-bit containers: no integer kernel takes an INT4 initializer.
    """
    parts = integer_parts(prepared, quantized)
    return frozenset(
        name for name, part in parts.items() if dialect == "folding" or not _fits_four_bits(integer_levels(part.weight))
    )


def _container(layer: str, weight: AnyWeight) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The codes in the narrowest type that DequantizeLinear of opset 21 takes, and their zero points."""
    if isinstance(weight, QuantizedWeight) and weight.zero is not None:
        kind: Any = ml_dtypes.uint4 if weight.spec.bits <= 4 else np.uint8
        return weight.codes.numpy().astype(kind), weight.zero.numpy().astype(kind)
    if any(part.table is not None and part.table.is_floating_point() for part, _ in parts_of(weight)):
        raise PlanError(
            "a format whose levels are no integers cannot be written as plain QDQ", where=layer, got=str(weight.spec),
            expected="int1..int8, ternary or log1..log4", fix="give the layer another format, or --dialect folding",
        )  # fmt: skip
    levels = integer_levels(weight)
    return levels.astype(ml_dtypes.int4 if _fits_four_bits(levels) else np.int8), None


def _fits_four_bits(levels: NDArray[np.int64]) -> bool:
    return bool(levels.min() >= _SMALL[0] and levels.max() <= _SMALL[1])


def _blocked(graph: Subgraph, weight: AnyWeight, codes: NDArray[Any], zero: NDArray[Any] | None) -> ir.Value:
    """One scale per block of a row; a matrix whose channels are its columns is blocked along its rows."""
    shape, axis = tuple(weight.shape), weight.axis
    matrix = len(shape) == 2
    turned = matrix and axis == 1

    def constant(label: str, array: NDArray[Any]) -> ir.Value:
        return graph.constant(label, np.ascontiguousarray(array.T if turned else array))

    rows = codes if matrix else np.moveaxis(codes, axis, 0).reshape(shape[axis], -1)
    inputs = [
        graph.constant("codes", np.ascontiguousarray(rows)),
        constant("scale", np.asarray(weight.scale.numpy())),
        *([] if zero is None else [constant("zero", zero)]),
    ]
    attributes = {"axis": 0 if turned else 1, "block_size": weight.spec.block}
    if matrix:
        return graph.node("DequantizeLinear", inputs, "dequantized", **attributes)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    values = graph.node("DequantizeLinear", inputs, "scaled", **attributes)
    target = graph.constant("moved_shape", np.array(moved, np.int64))
    if not axis:
        return graph.node("Reshape", [values, target], "dequantized")
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    return graph.node("Transpose", [graph.node("Reshape", [values, target], "first")], "dequantized", perm=order)
