"""What a graph must be before qopt works on it, and whether one image goes in."""

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
_OTHER_DOMAINS: Final = frozenset({("com.microsoft", "MatMulNBits")})
"""Operators outside the standard that files of qopt hold."""

_TAKES_INFINITY: Final = frozenset({"Clip", "Max", "Min", "Pad", "Where"})
"""Operators for which an infinite constant is a mask or a missing bound and not a broken weight."""

_TAKES_MASKS: Final = _TAKES_INFINITY | {
    "Add", "Cast", "CastLike", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Trilu", "Unsqueeze",
}  # fmt: skip
"""Operators on the way of a mask of minus infinity to the scores of an attention."""


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
    if (node.domain, node.op_type) in _OTHER_DOMAINS:
        return
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
        unknown = [output for output in model.graph.outputs if output.shape is None]
        for output in unknown:  # the checker wants a shape, which ONNX Runtime does without
            output.shape = ir.Shape([None, None])
        passes.CheckerPass()(model)
        for output in unknown:
            output.shape = None
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
        taking = _TAKES_INFINITY if (array == np.inf).any() else _TAKES_MASKS
        if np.isnan(array).any() or not users <= taking or not users:
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


def free_negative_sizes(model: ir.Model) -> None:
    """Make dynamic the axes of inputs and outputs that a file gives the size -1, as older exporters of Paddle do."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and -1 in value.shape:
            value.shape = ir.Shape([None if dim == -1 else dim for dim in value.shape])


def check_interface(model: ir.Model) -> None:
    """Refuse a graph without inputs or computed outputs, and inputs that no tensor can be.

    Raises:
        CorruptModelError: where the graph has no outputs.
        UnsupportedModelError: naming the input or output.
    """
    if not model.graph.outputs:
        raise CorruptModelError("the graph has no outputs", where=_title(model))
    if not model.graph.inputs:
        raise UnsupportedModelError("the network must have an input", where=_title(model), got="none")
    if all(value.producer() is None for value in model.graph.outputs):
        where = f"output {model.graph.outputs[0].name!r}"
        raise UnsupportedModelError("the outputs are not computed by the graph", where=where)
    for value in model.graph.inputs:
        _check_input(value)


def _check_input(value: ir.Value) -> None:
    where = f"input {value.name!r}"
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        raise UnsupportedModelError(
            "not a tensor with a known number of axes", where=where, got=str(value.type), fix="export it again"
        )
    sizes = [dim for dim in value.shape if isinstance(dim, int)]
    if prod(sizes) > LARGEST_TENSOR or any(size < 1 for size in sizes):
        raise UnsupportedModelError("an impossible size", where=where, got=str(value.shape))


def takes_no_image(model: ir.Model) -> str:
    """Why the inputs are no image of one size, float32 (batch, ...), in one clause; empty where they are."""
    inputs = model.graph.inputs
    if len(inputs) > 1:
        return f"it takes {len(inputs)} inputs: {', '.join(repr(value.name) for value in inputs)}"
    image = inputs[0]
    assert image.shape is not None
    if image.dtype != ir.DataType.FLOAT:
        return f"its input {image.name!r} is {image.dtype}"
    if len(image.shape) < 2 or not all(isinstance(dim, int) for dim in image.shape[1:]):
        sizes = ", ".join(str(dim) if isinstance(dim, int) else "?" for dim in image.shape)
        return f"its input {image.name!r} is no image of one size but ({sizes})"
    return ""


def keep_logits(model: ir.Model) -> tuple[str, ...]:
    """Keep the first output, the logits, and drop the others; returns the note that says so."""
    outputs = list(model.graph.outputs)
    del model.graph.outputs[1:]
    dropped = ", ".join(repr(value.name) for value in outputs[1:])
    return (f"{outputs[0].name!r} taken as the logits, outputs {dropped} dropped",) if dropped else ()


def _title(model: ir.Model) -> str:
    return f"graph {model.graph.name!r}"
