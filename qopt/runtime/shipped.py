"""What a written file holds of its layers: formats, and weights as the file itself unpacks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from qopt.errors import CorruptModelError
from qopt.runtime.external import DATA
from qopt.runtime.session import open_session


def shipped_formats(path: Path) -> dict[str, str | None]:
    """Layer to the format that its nodes say it has; raises CorruptModelError for what is no ONNX file."""
    return {layer: node_property(node, "qopt.format") for layer, node in layer_nodes(load_graph(path))}


def shipped_weights(
    path: Path, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, tuple[NDArray[np.float32], int]]]:
    """Layer to its weight as the file unpacks it, with the groups of its convolution.

    Layers whose node takes no weight of the layer's shape, as those that stay packed at run time, are left out.
    """
    if (path.parent / DATA).exists():
        return
    model = load_graph(path)
    made = {name: node for node in model.graph.node for name in node.output}
    constant = {initializer.name for initializer in model.graph.initializer}
    for layer, node in layer_nodes(model):
        shape = shapes.get(layer)
        for name in node.input:
            needed = _needed(name, made, constant)
            if shape is None or needed is None:
                continue
            weight = _computed(model, name, needed)
            if list(weight.shape) == list(shape) and weight.dtype == np.float32:
                groups = next((a.i for a in node.attribute if a.name == "group"), 1)
                yield layer, (weight, groups)
                break


def _needed(name: str, made: Mapping[str, onnx.NodeProto], constant: set[str]) -> list[onnx.NodeProto] | None:
    """The nodes that a constant value follows from, in any order; None where it depends on an input."""
    nodes, left, seen = list[onnx.NodeProto](), [name], set[str]()
    while left:
        value = left.pop()
        if not value or value in constant or value in seen:
            continue
        seen.add(value)
        if value not in made:
            return None
        nodes.append(made[value])
        left += made[value].input
    return nodes


def _computed(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> NDArray[Any]:
    """A constant value, computed by ONNX Runtime."""
    names = {value for node in nodes for value in node.input} | {name}
    wanted = {id(node) for node in nodes}
    ordered = [node for node in model.graph.node if id(node) in wanted]
    initializers = [initializer for initializer in model.graph.initializer if initializer.name in names]
    if not ordered:
        return onnx.numpy_helper.to_array(initializers[0])
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        ordered, "weight", [], [onnx.helper.make_tensor_value_info(name, kind, None)], initializers
    )
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = open_session(part.SerializeToString())
    return np.asarray(session.run([name], {})[0])


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph of a file, without the data beside it."""
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise CorruptModelError("not an ONNX file", where=str(path), got=str(error)) from error


def layer_nodes(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Layers with the nodes that apply them, in graph order."""
    for node in model.graph.node:
        layer = node_property(node, "qopt.layer")
        if layer is not None:
            yield layer, node


def node_property(node: onnx.NodeProto, key: str) -> str | None:
    """A property that was written at a node; None where it was not."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), None)
