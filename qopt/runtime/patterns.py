"""Packed weights as ONNX nodes that stock ONNX Runtime folds at load.

Codes of fewer than 8 bits stay packed on disk. `integer_weight` ends in DequantizeLinear on int8 values, which fuses
with quantized activations to QLinearConv, QGemm or QLinearMatMul, negative scales included; `float_weight` ends in
Cast and Mul, which folds to a plain float initializer (DequantizeLinear would stay, at 1.4-2.5 times the latency).

| codes | become int8 levels by |
|---|---|
| levels of 8 bits | nothing: INT8 |
| levels of 4 bits | INT4 -> Cast(INT8) |
| indices of 4 bits | UINT4 -> Cast(INT32) -> Gather(table) |
| up to 3 bits, ternary | UINT8 (groups, 1 or 3) -> Cast(INT32) -> digits -> Gather(table) -> Reshape |
| indices of 8 bits | UINT8 -> Cast(INT32) -> Gather: float levels, for `float_weight` only |
| rows of several formats | the levels of each as above -> Concat -> Gather(Cast(order)) |

No integer kernel takes a scale per block or a zero point: `float_weight` alone ends them, in

| codes | become float weights by |
|---|---|
| all others | levels -> Cast -> Mul(scale) |
| asymmetric: UINT8, UINT4, or digits without a table | Cast -> Sub(Cast(zero)) -> Mul(scale) |
| blocks: levels (channels, blocks, N) | Cast -> Mul(scale) -> Reshape -> Transpose where channels are not first |

Digits of a group (8 of base 2, 5 of base 3, 4 of base 4; 8 of base 8 in three bytes, which Mul and ReduceSum join) are
taken apart by Div by the powers of the base and Mod, which needs constants of some ten numbers, where a table by the
byte would need 256 rows. What is stored are the codes, the scales, the zero points, the order of rows and these, as
`qopt.size` counts them; beside these only the shapes and axes that Reshape, Slice, ReduceSum and ConstantOfShape take
(int64).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from qopt.errors import VerificationError
from qopt.quant import AnyWeight, QuantizedRows, QuantizedWeight, pack, parts_of, powers
from qopt.runtime.values import constant
from qopt.size import order_width

_ORDER_TYPES: dict[int, type[np.integer[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.int32}


@final
@dataclass
class Subgraph:
    """The nodes that compute one weight.

    Attributes:
        prefix: the layer's name, in front of every name.
        nodes: in topological order.
        initializers: the weight's own constants by name.
        tables: constants by name that every weight of a file shares: the same name always holds the same numbers.
    """

    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    tables: dict[str, ir.Value] = field(default_factory=dict)

    def within(self, label: str) -> Subgraph:
        """A part of this subgraph, whose names begin with ``prefix/label``."""
        return Subgraph(f"{self.prefix}/{label}", self.nodes, self.initializers, self.tables)

    def constant(self, label: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer ``prefix/label``."""
        name = f"{self.prefix}/{label}"
        self.initializers[name] = constant(name, array)
        return self.initializers[name]

    def table(self, label: str, array: NDArray[Any]) -> ir.Value:
        """The shared initializer ``qopt/label``."""
        name = f"qopt/{label}"
        if name not in self.tables:
            self.tables[name] = constant(name, array)
        return self.tables[name]

    def node(self, op: str, inputs: list[ir.Value], label: str, **attributes: Any) -> ir.Value:
        """Append a node named ``prefix/label`` and return its only output; its type is left to inference."""
        name = f"{self.prefix}/{label}"
        node = ir.node(op, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def integer_weight(layer: str, weight: AnyWeight, *, zero_points: bool) -> tuple[Subgraph, ir.Value]:
    """The weight as DequantizeLinear of int8 values, for a node whose activations are quantized.

    ``zero_points`` spells out the zero points, with which alone a Gemm fuses; they are computed, not stored.
    """
    graph = Subgraph(layer)
    inputs = [_levels(graph, weight), graph.constant("scale", weight.scale.numpy())]
    if zero_points:
        shape = graph.constant("channels", np.array(tuple(weight.scale.shape), np.int64))
        zero = ir.tensor(np.zeros(1, np.int8))
        inputs.append(graph.node("ConstantOfShape", [shape], "zero_points", value=zero))
    axis = {"axis": weight.axis} if weight.scale.ndim else {}
    return graph, graph.node("DequantizeLinear", inputs, "dequantized", **axis)


def float_weight(layer: str, weight: AnyWeight) -> tuple[Subgraph, ir.Value]:
    """The weight as float levels times the scale, for a node with float activations."""
    graph = Subgraph(layer)
    if isinstance(weight, QuantizedWeight) and weight.table is not None and weight.table.is_floating_point():
        levels = _float_levels(graph, weight)
    else:
        levels = graph.node("Cast", [_levels(graph, weight, cast=False)], "floats", to=ir.DataType.FLOAT)
    if isinstance(weight, QuantizedWeight) and weight.zero is not None:
        stored = graph.constant("zero", _beside_codes(weight, weight.zero))
        zero = graph.node("Cast", [stored], "zero_floats", to=ir.DataType.FLOAT)
        levels = graph.node("Sub", [levels, zero], "from_zero")
    scale = graph.constant("scale", _beside_codes(weight, weight.scale))
    if weight.scale.ndim < 2:
        return graph, graph.node("Mul", [levels, scale], "dequantized")
    return graph, _unblocked(graph, weight, graph.node("Mul", [levels, scale], "scaled"))


def has_integer_levels(weight: AnyWeight) -> bool:
    """Whether every level fits an int8 multiplier of a channel's scale, so that an integer kernel takes the weight."""
    return all(
        part.zero is None and part.scale.ndim < 2 and (part.table is None or not part.table.is_floating_point())
        for part, _ in parts_of(weight)
    )


def _beside_codes(weight: AnyWeight, values: Tensor) -> NDArray[Any]:
    """The scales or zero points in a shape that goes with the codes as they are stored."""
    if values.ndim == 2:
        return np.asarray(values.numpy()[:, :, None])
    return np.asarray(
        values.numpy().reshape([-1 if i == weight.axis and values.ndim else 1 for i in range(len(weight.shape))])
    )


def _stored_codes(weight: QuantizedWeight) -> NDArray[Any]:
    """The codes in the shape of the weight; in blocks (channels, blocks, weights of a block), channels moved first."""
    codes = np.asarray(weight.codes.numpy())
    if weight.scale.ndim < 2:
        return codes
    return np.ascontiguousarray(np.moveaxis(codes, weight.axis, 0)).reshape(*weight.scale.shape, weight.spec.block)


def _unblocked(graph: Subgraph, weight: AnyWeight, blocks: ir.Value) -> ir.Value:
    """The weight in its own shape, from (channels, blocks, weights of a block)."""
    axis, shape = weight.axis, tuple(weight.shape)
    moved = graph.constant("moved_shape", np.array((shape[axis], *shape[:axis], *shape[axis + 1 :]), np.int64))
    if not axis:
        return graph.node("Reshape", [blocks, moved], "dequantized")
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    return graph.node(
        "Transpose", [graph.node("Reshape", [blocks, moved], "channels_first")], "dequantized", perm=order
    )


def _levels(graph: Subgraph, weight: AnyWeight, *, cast: bool = True) -> ir.Value:
    """The int8 levels of a weight, its channels in place; ``cast`` as `_int8_levels` takes it."""
    if not isinstance(weight, QuantizedRows):
        return _int8_levels(graph, weight, cast=cast)
    if len(weight.parts) == 1:
        return _int8_levels(graph, weight.parts[0], cast=cast)
    levels = [_int8_levels(graph.within(f"rows_{i}"), part) for i, part in enumerate(weight.parts, 1)]
    joined = graph.node("Concat", levels, "joined", axis=weight.axis)
    order = weight.order.numpy()
    if np.array_equal(order, np.arange(len(order))):
        return joined
    stored = graph.constant("order", order.astype(_ORDER_TYPES[order_width(len(order))]))
    index = graph.node("Cast", [stored], "positions", to=ir.DataType.INT32)
    return graph.node("Gather", [joined, index], "ordered", axis=weight.axis)


def _int8_levels(graph: Subgraph, weight: QuantizedWeight, *, cast: bool = True) -> ir.Value:
    """The int8 multipliers of the scale; without ``cast`` INT4 codes are returned as stored, to be cast elsewhere.

    Of asymmetric formats the codes, of any integer type.
    """
    codes, base = _stored_codes(weight), weight.spec.packing.base
    if base <= 8:
        return _unpacked_levels(graph, weight)
    if weight.zero is not None:
        return graph.constant("codes", codes.astype(ml_dtypes.uint4) if base == 16 else codes)
    if weight.table is not None:
        stored = graph.constant("codes", codes.astype(ml_dtypes.uint4))
        return _look_up(
            graph, weight, graph.node("Cast", [stored], "index", to=ir.DataType.INT32), weight.table.numpy()
        )
    if base == 16:
        packed = graph.constant("codes", codes.astype(ml_dtypes.int4))
        return graph.node("Cast", [packed], "levels8", to=ir.DataType.INT8) if cast else packed
    return graph.constant("codes", codes)


def _unpacked_levels(graph: Subgraph, weight: QuantizedWeight) -> ir.Value:
    codes = _stored_codes(weight)
    if weight.zero is not None:
        levels = _digits(graph, weight, codes)
    else:
        table = _digit_levels(weight)
        levels = _look_up(graph, weight, _digits(graph, weight, _digits_of(graph, weight, table)), table)
    if codes.size % weight.spec.packing.codes:
        flat = graph.table("flat", np.array([-1], np.int64))
        start = graph.table("start", np.array([0], np.int64))
        end = graph.constant("size", np.array([codes.size], np.int64))
        levels = graph.node("Slice", [graph.node("Reshape", [levels, flat], "flat"), start, end], "cut")
    target = graph.constant("shape", np.array(codes.shape, np.int64))
    return graph.node("Reshape", [levels, target], "levels8")


def _digits_of(graph: Subgraph, weight: QuantizedWeight, table: NDArray[np.int8]) -> NDArray[Any]:
    """The digit that stands for each code, in the shape of `_stored_codes`; ``table`` has the level of each digit."""
    codes, base = _stored_codes(weight), weight.spec.packing.base
    if weight.table is not None:
        return codes
    digits = (codes < 0).astype(np.uint8) if base == 2 else codes % base
    if not np.array_equal(table[digits], codes):
        got = f"{codes.min()}..{codes.max()}"
        raise VerificationError(
            "codes that are no levels of the format", where=graph.prefix, expected=str(table.tolist()), got=got
        )
    return digits


def _digits(graph: Subgraph, weight: QuantizedWeight, digits: NDArray[Any]) -> ir.Value:
    """The digits (groups, codes), int32; those that fill up the last group are zeros."""
    packing = weight.spec.packing
    base, count, size = packing
    groups = graph.node("Cast", [graph.constant("codes", pack(digits, packing))], "bytes", to=ir.DataType.INT32)
    if size > 1:
        weights = graph.table(f"base{base}_bytes", powers(256, size))
        axis = graph.table("last_axis", np.array([-1], np.int64))
        groups = graph.node("ReduceSum", [graph.node("Mul", [groups, weights], "places"), axis], "groups", keepdims=1)
    shifted = graph.node("Div", [groups, graph.table(f"base{base}_powers", powers(base, count))], "shifted")
    return graph.node("Mod", [shifted, graph.table(f"base{base}", np.array(base, np.int32))], "index")


def _digit_levels(weight: QuantizedWeight) -> NDArray[np.int8]:
    """The level of each digit, int8 (base,): the weight's table, or 0, 1, .. and then the negative ones, ascending."""
    if weight.table is not None:
        return np.asarray(weight.table.numpy(), np.int8)
    base = weight.spec.packing.base
    digits = np.arange(base)
    return np.asarray([1, -1] if base == 2 else np.where(digits > (base - 1) // 2, digits - base, digits), np.int8)


def _look_up(graph: Subgraph, weight: QuantizedWeight, index: ir.Value, table: NDArray[Any]) -> ir.Value:
    """The levels at ``index``. Linear formats share tables by grid and width, all others by format."""
    spec = weight.spec
    kind = spec.quantizer if spec.quantizer in ("binary", "ternary") else spec.short
    name = f"mid{spec.bits}" if weight.grid == "mid" else kind
    return graph.node("Gather", [graph.table(f"{name}_levels", table), index], "levels", axis=0)


def _float_levels(graph: Subgraph, weight: QuantizedWeight) -> ir.Value:
    assert weight.table is not None
    stored = graph.constant("codes", _stored_codes(weight))
    index = graph.node("Cast", [stored], "index", to=ir.DataType.INT32)
    return _look_up(graph, weight, index, weight.table.numpy())
