"""The check on weights too large to be held in float all at once: each as the file computes it, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.runtime.session import open_session, to_bytes

ROWS: Final = 256
"""Rows of the identity matrix that a packed product is multiplied with at a time."""

ROUNDING: Final = 1e-6
"""Largest difference, relative to the largest weight, that the order of one or two products explains."""


def check_weights(prepared: Prepared, quantized: Quantized, emitted: ir.Model) -> None:
    """Run the nodes that make each quantized weight of ``emitted``, and nothing else, in ONNX Runtime.

    With `check_structure`, which says that everything but weights is the prepared network's, that is as good as
    running both networks on all inputs; and no more than one weight is ever in float.

    Raises:
        VerificationError: a weight that the file makes is not the one that the codes stand for; names the layer.
    """
    nodes = {node.name: node for node in emitted.graph}
    for layer in prepared.layers:
        if layer.name not in quantized.weights:
            continue
        expected = quantized.weights[layer.name].dequantize().numpy()
        largest = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
        for node in {id(nodes[use.node]): nodes[use.node] for use in layer.uses}.values():
            got = _made_by(emitted, node, expected.shape)
            if got.shape != expected.shape or not float(np.abs(got - expected).max()) <= ROUNDING * largest:
                raise VerificationError(
                    "the file computes another weight than the codes stand for",
                    where=f"{layer.name}, node {node.name!r}",
                )


def _made_by(model: ir.Model, node: ir.Node, shape: tuple[int, ...]) -> NDArray[Any]:
    if node.op_type == "MatMulNBits":
        weight = np.concatenate(list(_multiplied(model, node)))
        return weight if weight.shape == shape else weight.T
    value = node.inputs[0 if node.op_type == "Gather" else 1]
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":  # a tied table
        value = producer.inputs[0]
        assert value is not None
    (weight,) = open_session(to_bytes(_alone(model, [], [value])), lean=True).run(None, {})
    return np.asarray(weight)


def _multiplied(model: ir.Model, node: ir.Node) -> Iterator[NDArray[Any]]:
    """The transposed weight of a packed product, some rows at a time: rows of the identity times it."""
    source = node.inputs[0]
    assert source is not None
    columns = node.attributes["K"].as_int()
    part = _alone(model, [source], [node.outputs[0]])
    inside = next(iter(part.graph))
    if len(inside.inputs) > 5:
        inside.replace_input_with(5, None)  # the bias
    part.graph.inputs[0].shape, part.graph.outputs[0].shape = ir.Shape([None, columns]), None
    session = open_session(to_bytes(part), lean=True)
    for first in range(0, columns, ROWS):
        rows = np.eye(min(ROWS, columns - first), columns, first, dtype=np.float32)
        yield np.asarray(session.run(None, {str(source.name): rows})[0])


def _alone(model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    part = ir.Model(graph, ir_version=model.ir_version)
    part.opset_imports.update(model.opset_imports)
    return part
