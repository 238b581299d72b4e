"""QuantizeLinear and DequantizeLinear around activation values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qopt.quant import AffineRange
from qopt.runtime.values import constant


def quantize_values(graph: ir.Graph, activations: Mapping[str, AffineRange]) -> None:
    """Give every named value a QuantizeLinear / DequantizeLinear pair that all its consumers read from.

    Codes of fewer than 8 bits live in a uint8 container: a Clip before QuantizeLinear keeps them in their range.
    """
    values = {v.name: v for v in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
    for name, code in activations.items():
        _insert_pair(graph, values[name], code)


def _insert_pair(graph: ir.Graph, value: ir.Value, code: AffineRange) -> None:
    consumers = list(value.uses())
    scale = _register(graph, f"{value.name}/scale", np.array(code.scale, np.float32))
    zero = _register(graph, f"{value.name}/zero_point", np.array(code.zero_point, np.uint8))
    nodes: list[ir.Node] = []
    source = value
    if code.bits < 8:
        low = _register(graph, f"{value.name}/low", np.array(code.low, np.float32))
        high = _register(graph, f"{value.name}/high", np.array(code.high, np.float32))
        source = _append(nodes, "Clip", [source, low, high], f"{value.name}/clipped")
    codes = _append(nodes, "QuantizeLinear", [source, scale, zero], f"{value.name}/quantized")
    output = _append(nodes, "DequantizeLinear", [codes, scale, zero], f"{value.name}/dequantized")
    for user, position in consumers:
        user.replace_input_with(position, output)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def _append(nodes: list[ir.Node], op: str, inputs: list[ir.Value], name: str) -> ir.Value:
    node = ir.node(op, inputs, name=name)
    node.outputs[0].name = name
    nodes.append(node)
    return node.outputs[0]


def _register(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = constant(name, array)
    graph.initializers[name] = value
    return value
