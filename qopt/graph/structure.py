"""What a graph must be before qopt works on it: one image in, one row of logits out, operators that are known."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir
from onnx_ir.passes import common as passes

from qopt.errors import CorruptModelError, UnsupportedModelError
from qopt.graph.shapes import infer_shapes

LARGEST_TENSOR: Final = 2**31
"""Elements of the largest tensor, per image, that a network may compute; anything larger is a trap, not a network."""

_CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_RANDOM: Final = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_TAKES_INFINITY: Final = frozenset({"Clip", "Max", "Min", "Pad", "Where"})
"""Operators for which an infinite constant is a mask or a missing bound and not a broken weight."""


def check_nodes(model: ir.Model) -> None:
    """Refuse control flow, randomness and unknown operators.

    Raises:
        UnsupportedModelError: naming the node and the operator.
        CorruptModelError: where no opset is declared.
    """
    opset = model.opset_imports.get("")
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        raise CorruptModelError("the model declares no opset for the standard operators", where=_title(model))
    if not 1 <= opset <= newest:
        raise UnsupportedModelError(
            "unknown opset", where=_title(model), expected=f"1 to {newest}", got=str(opset), fix="export it again"
        )
    for node in model.graph:
        _check_node(node, opset)


def _check_node(node: ir.Node, opset: int) -> None:
    where = f"node {node.name!r}" if node.name else f"the node that computes {node.outputs[0].name!r}"
    if node.domain:
        raise UnsupportedModelError(f"operator {node.op_type} of the unknown domain {node.domain!r}", where=where)
    if node.op_type in _CONTROL_FLOW or any(_holds_graph(a) for a in node.attributes.values()):
        raise UnsupportedModelError(
            f"control flow operator {node.op_type}", where=where, fix="export the network for one fixed path"
        )
    if not onnx.defs.has(node.op_type, node.domain) or not _known(node.op_type, opset):
        raise UnsupportedModelError(f"unknown operator {node.op_type} in opset {opset}", where=where)
    if node.op_type in _RANDOM:
        raise UnsupportedModelError(f"operator {node.op_type} draws random numbers", where=where)
    if node.op_type in ("BatchNormalization", "Dropout") and _trains(node):
        raise UnsupportedModelError(
            f"{node.op_type} in training mode", where=where, fix="export the network after model.eval()"
        )


def _known(op_type: str, opset: int) -> bool:
    try:
        return not onnx.defs.get_schema(op_type, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


def _holds_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _trains(node: ir.Node) -> bool:
    mode = node.attributes.get("training_mode")
    if mode is not None:
        return bool(mode.as_int())
    flag = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    return flag is not None and (flag.const_value is None or bool(flag.const_value.numpy().any()))


def sorted_copy(model: ir.Model) -> ir.Model:
    """A copy whose nodes come after what they read; raises CorruptModelError where there is no such order."""
    try:
        copy = model.clone()
    except RuntimeError:  # values read before they are made, or never made: only a copy by way of bytes takes those
        copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    try:
        passes.TopologicalSortPass()(copy)
    except Exception as error:  # the pass manager wraps whatever the sort raised
        raise CorruptModelError("the nodes depend on each other in a circle", where=_title(model)) from error
    return copy


def check_valid(model: ir.Model) -> None:
    """Infer shapes and run the ONNX checker; raises CorruptModelError with its first line."""
    try:
        infer_shapes(model)
        for output in model.graph.outputs:  # the checker wants a shape, which ONNX Runtime does without
            output.shape = output.shape if output.shape is not None else ir.Shape([None, None])
        passes.CheckerPass()(model)
    except Exception as error:  # the checker raises whatever its C++ code met first
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise CorruptModelError("not a valid ONNX graph", where=_title(model), got=reason[0]) from error


def check_finite(model: ir.Model) -> None:
    """Refuse NaN in any constant, and infinity in any that is not a mask or a bound.

    Raises:
        CorruptModelError: naming the constant.
    """
    for value, array in _float_constants(model):
        if np.isfinite(array).all():
            continue
        users = {node.op_type for node in value.consumers()}
        if np.isnan(array).any() or not users <= _TAKES_INFINITY or not users:
            kind = "NaN" if np.isnan(array).any() else "infinity"
            raise CorruptModelError(f"the constant holds {kind}", where=repr(value.name), expected="finite weights")


def _float_constants(model: ir.Model) -> Iterator[tuple[ir.Value, np.ndarray]]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise CorruptModelError("the initializer has no data", where=repr(value.name))
        if tensor.dtype.is_floating_point():
            array = tensor.numpy()
            # numpy knows no isfinite for the 16- and 8-bit types of ml_dtypes
            yield value, array if array.dtype.kind == "f" else array.astype(np.float32)


def check_sizes(model: ir.Model) -> None:
    """Refuse a graph that computes a tensor of more than `LARGEST_TENSOR` elements; shapes must be inferred.

    Raises:
        UnsupportedModelError: naming the value.
    """
    for node in model.graph:
        for value in node.outputs:
            elements = prod(dim for dim in value.shape if isinstance(dim, int)) if value.shape is not None else 0
            if elements > LARGEST_TENSOR:
                raise UnsupportedModelError(
                    "the tensor is too large", where=repr(value.name), expected=f"at most {LARGEST_TENSOR} elements",
                    got=str(elements),
                )  # fmt: skip


def image_input(model: ir.Model) -> ir.Value:
    """The only input that is no initializer: float32, shape (batch, ...) with every other size fixed.

    Raises:
        UnsupportedModelError: saying what the network takes instead.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        named = ", ".join(repr(value.name) for value in inputs) or "none"
        raise UnsupportedModelError("the network must have one image input", expected="1 input", got=named)
    image = inputs[0]
    where = f"image input {image.name!r}"
    if image.dtype != ir.DataType.FLOAT:
        raise UnsupportedModelError("not a float32 tensor", where=where, got=str(image.dtype))
    shape = image.shape
    if shape is None or len(shape) < 2 or not all(isinstance(dim, int) and dim > 0 for dim in shape[1:]):
        raise UnsupportedModelError(
            "the image size must be known", where=where, expected="(batch, channels, height, width) with fixed sizes",
            got=str(shape), fix="export it with only the batch axis dynamic",
        )  # fmt: skip
    if (isinstance(shape[0], int) and shape[0] < 1) or prod(d for d in shape if isinstance(d, int)) > LARGEST_TENSOR:
        raise UnsupportedModelError("an impossible image size", where=where, got=str(shape))
    return image


def keep_logits(model: ir.Model) -> tuple[str, ...]:
    """Keep the first output, the logits, and drop the others; returns the note that says so.

    Raises:
        CorruptModelError: where the graph has no outputs.
        UnsupportedModelError: where the first one does not come from a node of the graph.
    """
    outputs = list(model.graph.outputs)
    if not outputs:
        raise CorruptModelError("the graph has no outputs", where=_title(model))
    if outputs[0].producer() is None:
        raise UnsupportedModelError("the logits are not computed by the graph", where=f"output {outputs[0].name!r}")
    del model.graph.outputs[1:]
    dropped = ", ".join(repr(value.name) for value in outputs[1:])
    return (f"{outputs[0].name!r} taken as the logits, outputs {dropped} dropped",) if dropped else ()


def _title(model: ir.Model) -> str:
    return f"graph {model.graph.name!r}"
