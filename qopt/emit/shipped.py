"""The check on the bytes that ship: every layer that the plan quantizes is read from codes there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import onnx
from onnx import TensorProto

from qopt.errors import VerificationError
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AnyWeight

CODES = frozenset(
    {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2}
)
"""Types of initializers that hold codes."""


def check_shipped(prepared: Prepared, quantized: Quantized, data: bytes) -> None:
    """Look for every quantized layer in ``data``, a serialized model; data beside it are not needed.

    A use counts as quantized where its weight comes from constants alone: enough codes for all weights, eight in a
    byte at most, and no float tensor of the weight's own shape, unless that is the shape of its scales.

    Raises:
        VerificationError: naming the layers that are missing or float.
    """
    graph = onnx.load_model_from_string(data).graph
    nodes = {node.name: node for node in graph.node}
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    left = [
        layer.name
        for layer in prepared.layers
        if layer.name in quantized.weights
        and not all(
            _coded(layer, nodes.get(use.node), quantized.weights[layer.name], makers, constants) for use in layer.uses
        )
    ]
    if left:
        raise VerificationError(
            "layers that the plan quantizes are not quantized in the file that ships", where=", ".join(left)
        )


def _coded(
    layer: Layer,
    node: onnx.NodeProto | None,
    weight: AnyWeight,
    makers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> bool:
    if node is None:
        return False
    names = set(_sources(node.input[0 if node.op_type == "Gather" else 1], makers))
    if not names <= set(constants):  # something that an input of the network changes
        return False
    stored = [constants[name] for name in names]
    floats = any(t.data_type == TensorProto.FLOAT and tuple(t.dims) == layer.shape for t in stored)
    codes = sum(prod(t.dims) for t in stored if t.data_type in CODES)
    return 8 * codes >= layer.weights and not (floats and weight.scale.numel() < layer.weights)


def _sources(name: str, makers: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """The names without a maker that ``name`` is computed from."""
    waiting, seen = [name], set()
    while waiting:
        current = waiting.pop()
        if current in seen or not current:
            continue
        seen.add(current)
        if current in makers:
            waiting += makers[current].input
        else:
            yield current
