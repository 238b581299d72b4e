"""Shape inference on the prepared graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

# A failed inference leaves the shapes unknown and is logged; a library stays silent unless its user asks for logs.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes and types of the values, as far as ONNX's inference can tell."""
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of everything computed, so that none survives from another batch size."""
    for node in model.graph:
        for output in node.outputs:
            output.shape = None


def set_batch(model: ir.Model, batch: int | str) -> None:
    """Declare the batch size of the image input, a number or a symbol, and infer all shapes anew."""
    image = model.graph.inputs[0]
    assert image.shape is not None
    image.shape = ir.Shape([batch, *image.shape[1:]])
    forget_shapes(model)
    infer_shapes(model)


def fix_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Declare the shapes of the inputs by name, and infer all shapes anew."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[str(value.name)])
    forget_shapes(model)
    infer_shapes(model)
