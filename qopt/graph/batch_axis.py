"""Freeing the batch axis of a graph that was exported for one batch size."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.graph.names import unique, value_names
from qopt.graph.shapes import set_batch

SYMBOL: Final = "batch"


def fixed_batch(image: ir.Value) -> int | None:
    """The batch size that the input declares, None where it is a symbol."""
    assert image.shape is not None
    first = image.shape[0]
    return first if isinstance(first, int) else None


def free_batch(model: ir.Model) -> None:
    """Make the batch axis of the image input symbolic, keeping the user's symbol, and infer all shapes anew."""
    image = model.graph.inputs[0]
    assert image.shape is not None
    first = image.shape[0]
    symbol = first.value if isinstance(first, ir.SymbolicDim) else None
    set_batch(model, symbol or SYMBOL)


def repair_reshapes(model: ir.Model, batch: int) -> int:
    """Let every Reshape whose constant target starts with ``batch`` take any batch size.

    A target without -1 gets -1 in front, which the number of elements settles; one with a -1 gets 0, which copies the
    first size of what is reshaped. Whether the first entry really was the batch is for the caller to prove.

    Returns:
        The number of targets that changed.
    """
    repaired = 0
    dependent = {model.graph.inputs[0]}
    for node in model.graph:
        if not any(value in dependent for value in node.inputs if value is not None):
            continue
        dependent.update(node.outputs)
        target = node.inputs[1] if node.op_type == "Reshape" else None
        if target is None or not target.is_initializer() or target.const_value is None:
            continue
        entries = _freed(target.const_value.numpy(), batch, _zero_is_a_size(node))
        if entries is not None:
            node.replace_input_with(1, _constant(model.graph, f"{target.name}_any_batch", entries))
            repaired += 1
    return repaired


def _freed(entries: NDArray[np.int64], batch: int, zero_is_a_size: bool) -> NDArray[np.int64] | None:
    if entries.ndim != 1 or not entries.size or entries[0] != batch:
        return None
    if not (entries[1:] == -1).any():
        first = -1
    elif not zero_is_a_size:
        first = 0
    else:
        return None
    return np.concatenate([[first], entries[1:]]).astype(np.int64)


def _zero_is_a_size(node: ir.Node) -> bool:
    allowzero = node.attributes.get("allowzero")
    return allowzero is not None and bool(allowzero.as_int())


def _constant(graph: ir.Graph, wanted: str, array: NDArray[np.int64]) -> ir.Value:
    name = unique(wanted, value_names(graph).__contains__)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(array, name=name),
    )  # fmt: skip
    graph.register_initializer(value)
    return value
