"""Bringing a graph to the opset that the rest of qopt speaks."""

from __future__ import annotations

from typing import Final

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnxscript import version_converter

from qopt.errors import UnsupportedModelError

OPSET: Final = 21
"""The oldest opset of a prepared graph: the first with int4 types and blocked DequantizeLinear."""

IR_VERSION: Final = 10
"""The IR version that opset 21 needs."""

_CENTRED: Final = 11
"""The first opset whose Resize can count from the middle of pixels, which is its default since."""

_REWRITTEN: Final = 18
"""The oldest opset that onnxscript's converter takes; it keeps all metadata, ONNX's own does not."""


def convert_opset(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """``model`` at opset 21 or, where it is newer, as it is; with the note that says so.

    Raises:
        UnsupportedModelError: where no converter knows how.
    """
    old = model.opset_imports[""]
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    if old >= OPSET:
        return model, ()
    try:
        if old >= _REWRITTEN:
            version_converter.convert_version(model, OPSET)
            converted = model
        else:
            converted = _convert_old(model)
            if old < _CENTRED:
                _count_from_the_corner(converted)
    except Exception as error:  # both converters raise plain RuntimeErrors and worse
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"opset {old} cannot be converted to {OPSET}", got=lines[0], fix=f"export it with opset {OPSET}"
        ) from error
    return converted, (f"opset {old} converted to {OPSET}",)


def _convert_old(model: ir.Model) -> ir.Model:
    """ONNX's converter forgets metadata and documentation: put back what belongs to what is still there."""
    proto = onnx.version_converter.convert_version(ir.serde.serialize_model(model), OPSET)
    converted = ir.serde.deserialize_model(proto)
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    converted.domain, converted.model_version = model.domain, model.model_version
    converted.doc_string = model.doc_string
    converted.metadata_props.update(model.metadata_props)
    converted.graph.doc_string = model.graph.doc_string
    converted.graph.metadata_props.update(model.graph.metadata_props)
    nodes = {node.name: node for node in model.graph}
    for node in converted.graph:
        origin = nodes.get(node.name)
        if origin is not None:
            node.metadata_props.update(origin.metadata_props)
            node.doc_string = origin.doc_string
    return converted


def _count_from_the_corner(model: ir.Model) -> None:
    """Say what Upsample and the first Resize did, which ONNX's converter leaves to defaults that mean something else.

    Coordinates counted from the corner of the image; nearest rounded down, where the image shrinks up (as ONNX Runtime
    has it, the specification does not say).
    """
    for node in model.graph:
        if node.op_type != "Resize":
            continue
        scales = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        shrinks = scales is not None and bool((scales.numpy() < 1).any())
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "asymmetric"
        )
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")
