"""Reductions over axes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

_REDUCERS: Final[dict[str, Any]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
}


@operator(*_REDUCERS)
def reduce(op: Op) -> Call:
    """Without axes, all of them, or none where ``noop_with_empty_axes`` says so."""
    axes, keep = op.known_sizes(1), bool(op.integer("keepdims", 1))
    if axes:
        return Call(_REDUCERS[op.node.op_type], (op.arg(0), axes, keep))
    if op.integer("noop_with_empty_axes", 0):
        return Call(torch.clone, (op.arg(0),))
    return Call(reduce_all, (op.arg(0), op.node.op_type, keep))


def reduce_all(x: Tensor, kind: str, keep: bool) -> Tensor:
    """The reduction called ``kind`` over every axis."""
    result: Tensor = _REDUCERS[kind](x, tuple(range(x.ndim)), keep) if x.ndim else x
    return result
