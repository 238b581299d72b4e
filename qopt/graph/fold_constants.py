"""Removing what need not be computed: constants, identities, dropout, dead code."""

from __future__ import annotations

import logging
from math import prod
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir

# The folder reports what it leaves alone as warnings; a library stays silent unless its user asks for logs.
logging.getLogger("onnxscript").addHandler(logging.NullHandler())

_SMALL: Final = 2**18
"""Elements that any folded constant may have; a larger one must not outgrow what it was computed from."""

_GROUP: Final = 8
"""Codes of the fullest group, which Div by the powers of their base takes apart (`qopt.runtime.patterns`)."""

_LARGEST: Final = 2**29
"""Elements of the largest weight that is computed from another one (transposed, cast, normalised)."""


def lift_constants(model: ir.Model) -> None:
    """Turn every Constant node into an initializer of the same name."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def fold_constants(model: ir.Model) -> None:
    """Compute what depends on no input, and drop identities, dropout and dead code; names of what stays survive."""
    remaining = -1
    while remaining != len(model.graph):
        remaining = len(model.graph)
        fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=_LARGEST, output_size_limit=_LARGEST,
            should_fold=_should_fold,
        )  # fmt: skip
        lift_constants(model)
        _drop_dropout(model)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Never evaluate what has an unknown or a huge result; None leaves the choice to the folder's own rules."""
    shape = node.outputs[0].shape
    if len(node.outputs) != 1 or shape is None or not shape.is_static():
        return False
    size = prod(dim for dim in shape if isinstance(dim, int))
    sources = [value.const_value.size for value in node.inputs if value is not None and value.const_value is not None]
    growth = _GROUP if node.op_type == "Div" else 1
    if size > max(_SMALL, *(growth * source for source in sources), 0):
        return False
    return True if node.op_type == "ConstantOfShape" else None


def _drop_dropout(model: ir.Model) -> None:
    for node in list(model.graph):
        mask_used = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
        data = node.inputs[0] if node.op_type == "Dropout" else None
        if data is None or mask_used:
            continue
        identity = ir.Node("", "Identity", [data], num_outputs=1, name=node.name)
        identity.outputs[0].name = node.outputs[0].name
        identity.outputs[0].type, identity.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        model.graph.insert_before(node, identity)
        node.outputs[0].replace_all_uses_with(identity.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
