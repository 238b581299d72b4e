"""QuantizeLinear and DequantizeLinear around activation values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qopt.emit.additions import Additions
from qopt.emit.integer import makes_redundant
from qopt.errors import VerificationError
from qopt.quant import AffineRange


def quantize_values(additions: Additions, activations: Mapping[str, AffineRange]) -> None:
    """Give every named value a QuantizeLinear / DequantizeLinear pair that all its consumers read from.

    Codes of fewer than 8 bits live in a uint8 container, and a Clip between the two keeps them in their range. It
    clips codes and not numbers, because ONNX Runtime fuses an operator with the QuantizeLinear right behind it only.

    Raises:
        VerificationError: a name that no node computes and no input has, or a value that nothing reads.
    """
    graph = additions.graph
    values = {v.name: v for v in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
    for name, code in activations.items():
        if name not in values:
            raise VerificationError("no value of the graph is called like the activation to be quantized", where=name)
        if not values[name].uses():
            raise VerificationError("an activation is to be quantized that no node reads", where=name)
        _insert_pair(additions, values[name], code)


def _insert_pair(additions: Additions, value: ir.Value, code: AffineRange) -> None:
    graph, name, producer = additions.graph, str(value.name), value.producer()
    consumers = list(value.uses())
    scale = additions.constant(f"{name}/scale", np.array(code.scale, np.float32))
    zero = additions.constant(f"{name}/zero_point", np.array(code.zero_point, np.uint8))
    source = _source(value, code)
    nodes = [additions.node("QuantizeLinear", [source, scale, zero], f"{name}/quantized")]
    if code.bits < 8:
        largest = additions.shared(f"qopt/largest_code_{code.bits}", np.array(code.largest_code, np.uint8))
        nodes.append(additions.node("Clip", [nodes[-1].outputs[0], None, largest], f"{name}/clipped"))
    nodes.append(additions.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero], f"{name}/dequantized"))
    for user, position in consumers:
        user.replace_input_with(position, nodes[-1].outputs[0])
    if producer is None:
        graph.insert_before(graph[0], nodes)
        return
    graph.insert_after(producer, nodes)
    if source is not value and not value.is_graph_output():
        graph.remove(producer, safe=True)


def _source(value: ir.Value, code: AffineRange) -> ir.Value:
    """What is quantized: the value, or what it is clipped from where the codes clip the same.

    ONNX Runtime takes such a Clip for one that changes values, because it looks at all 256 codes of the container.
    """
    producer = value.producer()
    if code.bits == 8 or producer is None or producer.op_type != "Clip" or not makes_redundant(code, producer):
        return value
    source = producer.inputs[0]
    assert source is not None
    return source
