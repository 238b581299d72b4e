"""Packed weights as ONNX nodes that stock ONNX Runtime folds at load.

Codes of 4 and 2 bits stay packed on disk. `integer_weight` ends in DequantizeLinear on int8 values, which fuses with
quantized activations to QLinearConv, QGemm or QLinearMatMul; `float_weight` ends in Cast and Mul, which folds to a
plain float initializer (DequantizeLinear there would stay and cost 1.4-2.5 times the latency).

| container | linear | log, at most 4 bits | log, more bits |
|---|---|---|---|
| 4 bits | INT4 -> Cast(INT8) | UINT4 -> Cast(INT32) -> Gather(int8 table) | |
| 2 bits | four codes in a byte: UINT8 -> Cast(INT32) -> Gather(256 x 4 int8 table) -> Reshape | the same | |
| 8 bits | INT8 | | UINT8 -> Cast(INT32) -> Gather(float table) |

What is stored are the codes, the scales and the tables, as `qopt.size` counts them; beside these only the shapes that
Reshape, Slice and ConstantOfShape take (int64).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.quant import QuantizedWeight, pack
from qopt.runtime.values import constant


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


def integer_weight(layer: str, weight: QuantizedWeight, *, zero_points: bool) -> tuple[Subgraph, ir.Value]:
    """The weight as DequantizeLinear of int8 values, for a node whose activations are quantized.

    ``zero_points`` spells out the zero points, with which alone a Gemm fuses; they are computed, not stored.
    """
    graph = Subgraph(layer)
    inputs = [_int8_levels(graph, weight), graph.constant("scale", weight.scale.numpy())]
    if zero_points:
        shape = graph.constant("channels", np.array(tuple(weight.scale.shape), np.int64))
        zero = ir.tensor(np.zeros(1, np.int8))
        inputs.append(graph.node("ConstantOfShape", [shape], "zero_points", value=zero))
    axis = {"axis": weight.axis} if weight.scale.ndim else {}
    return graph, graph.node("DequantizeLinear", inputs, "dequantized", **axis)


def float_weight(layer: str, weight: QuantizedWeight) -> tuple[Subgraph, ir.Value]:
    """The weight as float levels times the scale, for a node with float activations."""
    graph = Subgraph(layer)
    if has_integer_levels(weight):
        source = _int8_levels(graph, weight, cast=weight.spec.kind == "log")
        levels = graph.node("Cast", [source], "levels", to=ir.DataType.FLOAT)
    else:
        levels = _float_levels(graph, weight)
    shape = [1] * weight.codes.ndim
    if weight.scale.ndim:
        shape[weight.axis] = -1
    scale = graph.constant("scale", weight.scale.numpy().reshape(shape))
    return graph, graph.node("Mul", [levels, scale], "dequantized")


def has_integer_levels(weight: QuantizedWeight) -> bool:
    """Whether every level fits an int8 multiplier of the scale, so that an integer kernel can take the weight."""
    return weight.table is None or not weight.table.is_floating_point()


def _int8_levels(graph: Subgraph, weight: QuantizedWeight, *, cast: bool = True) -> ir.Value:
    """The int8 multipliers of the scale; without ``cast`` INT4 codes are returned as stored, to be cast elsewhere."""
    codes, container = weight.codes.numpy(), weight.spec.container_bits
    if container == 2:
        return _two_bit_levels(graph, weight)
    if weight.table is not None:
        stored = graph.constant("codes", codes.astype(ml_dtypes.uint4))
        index = graph.node("Cast", [stored], "index", to=ir.DataType.INT32)
        table = graph.table(f"log{weight.spec.bits}_levels", weight.table.numpy())
        return graph.node("Gather", [table, index], "levels8", axis=0)
    if container == 4:
        packed = graph.constant("codes", codes.astype(ml_dtypes.int4))
        return graph.node("Cast", [packed], "levels8", to=ir.DataType.INT8) if cast else packed
    return graph.constant("codes", codes)


def _two_bit_levels(graph: Subgraph, weight: QuantizedWeight) -> ir.Value:
    codes = weight.codes.numpy()
    stored = graph.constant("codes", pack(codes, 2, signed=weight.table is None))
    table = graph.table(f"{'int' if weight.table is None else 'log'}2_levels", _byte_table(weight))
    index = graph.node("Cast", [stored], "index", to=ir.DataType.INT32)
    levels = graph.node("Gather", [table, index], "rows", axis=0)
    if codes.size % 4:
        flat = graph.table("flat", np.array([-1], np.int64))
        start = graph.table("start", np.array([0], np.int64))
        end = graph.constant("size", np.array([codes.size], np.int64))
        levels = graph.node("Slice", [graph.node("Reshape", [levels, flat], "flat"), start, end], "cut")
    target = graph.constant("shape", np.array(codes.shape, np.int64))
    return graph.node("Reshape", [levels, target], "levels8")


def _byte_table(weight: QuantizedWeight) -> NDArray[np.int8]:
    """All four levels of every byte: int8 (256, 4)."""
    codes = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    levels = np.where(codes >= 2, codes - 4, codes) if weight.table is None else weight.table.numpy()[codes]
    return np.asarray(levels, np.int8)


def _float_levels(graph: Subgraph, weight: QuantizedWeight) -> ir.Value:
    assert weight.table is not None
    stored = graph.constant("codes", weight.codes.numpy())
    index = graph.node("Cast", [stored], "index", to=ir.DataType.INT32)
    table = graph.table(f"log{weight.spec.bits}_levels", weight.table.numpy())
    return graph.node("Gather", [table, index], "levels", axis=0)
