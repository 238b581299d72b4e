"""The quantized network written out in float, and the check that a file computes it and is the user's graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from qopt.errors import VerificationError
from qopt.graph.compare import largest_difference
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.runtime.external import loadable, to_files
from qopt.runtime.session import open_session, run_feeds

AGREES: Final = 1e-4
"""Largest relative difference between a file and the network in float: that of fused kernels."""


def dequantized(prepared: Prepared, quantized: Quantized) -> ir.Model:
    """A copy of the prepared graph with the values of the quantized weights in float; biases and activations stay."""
    model = prepared.model.clone()
    for layer in prepared.layers:
        if layer.name in quantized.weights:
            values = np.ascontiguousarray(quantized.weights[layer.name].dequantize().numpy(), np.float32)
            model.graph.initializers[layer.initializer].const_value = ir.tensor(values, name=layer.initializer)
    return model


def check_weight_only(prepared: Prepared, quantized: Quantized, emitted: ir.Model, data: bytes | Path) -> None:
    """Check a file whose activations and biases are float's: as ``emitted`` in memory, as ``data`` in ONNX Runtime.

    ``data`` are its bytes, or its path where there are others beside it.

    Raises:
        VerificationError: it is another graph than the prepared one but for its weights, or its outputs on the
            prepared network's example differ from those of `dequantized` by more than `AGREES`.
    """
    check_structure(prepared, quantized, emitted)
    with loadable(to_files(dequantized(prepared, quantized))) as file:
        expected = run_feeds(open_session(file), prepared.example)
    differs = largest_difference(run_feeds(open_session(data), prepared.example), expected)
    if not differs <= AGREES:
        raise VerificationError(
            "the file computes something else than the quantized network", expected=f"at most {AGREES:g}",
            got=f"relative difference {differs:.2g}",
        )  # fmt: skip


def check_structure(prepared: Prepared, quantized: Quantized, emitted: ir.Model) -> None:
    """Check that inputs, outputs, opset and every node are the prepared graph's, but for where weights come from.

    Raises:
        VerificationError: naming what differs.
    """
    before, after = prepared.model.graph, emitted.graph
    packed = {layer.initializer for layer in prepared.layers if layer.name in quantized.weights}
    _same("opset", prepared.model.opset_imports[""], emitted.opset_imports[""])
    _same("inputs", _interface(before.inputs), _interface(after.inputs))
    _same("outputs", _interface(before.outputs), _interface(after.outputs))
    nodes = {node.name: node for node in after}
    for node in before:
        where = f"node {node.name!r}"
        if node.name not in nodes:
            raise VerificationError("a node of the network is missing in the file", where=where)
        if packed & {str(v.name) for v in node.inputs if v is not None} and nodes[node.name].op_type == "MatMulNBits":
            _check_packed(where, node, nodes[node.name])
            continue
        _same(where, _facts(node), _facts(nodes[node.name]))
        for old, new in zip(node.inputs, nodes[node.name].inputs, strict=True):
            if old is None or old.name not in packed:
                _same(where, old and old.name, new and new.name)
            elif new is None or new.producer() is None:
                raise VerificationError("a quantized weight is still float in the file", where=where, got=str(old.name))


def _check_packed(where: str, node: ir.Node, packed: ir.Node) -> None:
    """A product whose weight stays packed: same input, same output, and activations that stay float."""
    level = packed.attributes.get("accuracy_level")
    _same(f"accuracy_level of {where}", 1, None if level is None else level.as_int())
    names = [(n.inputs[0] and n.inputs[0].name, [v.name for v in n.outputs]) for n in (node, packed)]
    _same(where, *names)


def _facts(node: ir.Node) -> tuple[Any, ...]:
    attributes = sorted(ir.serde.serialize_attribute(a).SerializeToString() for a in node.attributes.values())
    return node.domain, node.op_type, attributes, [value.name for value in node.outputs], len(node.inputs)


def _interface(values: Any) -> list[str]:
    return [f"{value.name} {value.dtype} {value.shape}" for value in values]


def _same(where: str, expected: object, got: object) -> None:
    if expected != got:
        raise VerificationError(
            "the file is another graph than the network", where=where, expected=str(expected), got=str(got)
        )
