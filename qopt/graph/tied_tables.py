"""A table of embeddings that the output layer reads too is one weight, also where folding made two of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qopt.graph.names import unique, value_names


def tie_tables(model: ir.Model) -> int:
    """Let every MatMul by the transpose of a table that a Gather reads read that table, transposed at run time.

    Folding computes the transpose, and the file would hold the largest weight of a language model twice. ONNX Runtime
    computes it at load.

    Returns:
        The number of weights that went.
    """
    graph, tied = model.graph, 0
    tables = [table for node in graph if node.op_type == "Gather" and (table := _matrix(node.inputs[0])) is not None]
    for node in [node for node in graph if node.op_type == "MatMul"]:
        weight = _matrix(node.inputs[1])
        table = next((t for t in tables if weight is not None and _is_transpose(t, weight)), None)
        if table is None or weight is None:
            continue
        transpose = ir.node("Transpose", [table], attributes={"perm": [1, 0]})
        taken = value_names(graph) | {str(other.name) for other in graph}
        transpose.name = transpose.outputs[0].name = unique(f"{table.name}/transposed", taken.__contains__)
        transpose.outputs[0].shape, transpose.outputs[0].type = weight.shape, weight.type
        graph.insert_before(node, transpose)
        node.replace_input_with(1, transpose.outputs[0])
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[str(weight.name)]
        tied += 1
    return tied


def _matrix(value: ir.Value | None) -> ir.Value | None:
    """``value`` where it is a constant float matrix."""
    fits = value is not None and value.is_initializer() and value.const_value is not None
    if not fits or value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return None
    return value if len(value.const_value.shape) == 2 else None


def _is_transpose(table: ir.Value, weight: ir.Value) -> bool:
    assert table.const_value is not None
    assert weight.const_value is not None
    if tuple(table.const_value.shape) != tuple(reversed(tuple(weight.const_value.shape))):
        return False
    return bool(np.array_equal(table.const_value.numpy().T, weight.const_value.numpy()))
