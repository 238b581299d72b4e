"""One number for what a network computes and how its layers are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx_ir as ir

from qopt.graph.model import Layer


def digest(model: ir.Model, layers: Iterable[Layer]) -> str:
    """SHA-256 over operators, attributes, connections, constants, the inputs' shapes and the names of the layers.

    Every value is hashed from its producer and that node's inputs, so the order of nodes and initializers in the file,
    the names of nodes and of other values, documentation and metadata do not count.
    """
    known = {value: _input(value, index) for index, value in enumerate(model.graph.inputs)}
    for name, value in model.graph.initializers.items():
        known[value] = _constant(value, name)
    for node in model.graph:
        attributes = [_attribute(node.attributes[key]) for key in sorted(node.attributes)]
        inputs = [known[value] if value is not None else "" for value in node.inputs]
        body = _hash(node.domain, node.op_type, *attributes, *inputs)
        for index, output in enumerate(node.outputs):
            known[output] = _hash(body, str(index))
    named = [f"{layer.name}={known[model.graph.initializers[layer.initializer]]}" for layer in layers]
    opset = str(model.opset_imports[""])
    return _hash(opset, *(known[value] for value in model.graph.outputs), *sorted(named))


def _input(value: ir.Value, index: int) -> str:
    """Its type, its sizes but the batch's, and, beyond the first, its place; what symbols are called does not count."""
    sizes = tuple(dim if isinstance(dim, int) else None for dim in value.shape[1:]) if value.shape is not None else None
    return _hash("input", str(value.dtype), str(sizes), *([str(index)] if index else []))


def _hash(*parts: str) -> str:
    state = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "backslashreplace")
        state.update(len(encoded).to_bytes(8, "little") + encoded)
    return state.hexdigest()


def _constant(value: ir.Value, name: str) -> str:
    tensor = value.const_value
    assert tensor is not None, name
    return _hash("constant", str(tensor.dtype), str(tuple(tensor.shape)), hashlib.sha256(tensor.tobytes()).hexdigest())


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        text = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.tobytes()).hexdigest()}"
    elif isinstance(attribute.value, (list, tuple)):
        text = repr(list(attribute.value))
    else:
        text = repr(attribute.value)
    return f"{attribute.name} {attribute.type} {text}"
