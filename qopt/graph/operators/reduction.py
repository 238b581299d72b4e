"""Reductions over axes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx

from qopt.graph.operators.registry import Call, Op, operator

Axes = tuple[int, ...]


def product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The product over ``axes``."""
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x if keep else _without(x, axes)


def absolute_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The sum of absolute values."""
    return x.abs().sum(axes, keep).to(x.dtype)


def square_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The sum of squares."""
    return (x * x).sum(axes, keep).to(x.dtype)


def length(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The root of the sum of squares, whose gradient at zero is zero."""
    if not x.is_floating_point():
        return square_sum(x, axes, keep).to(torch.float64).sqrt().to(x.dtype)
    result: Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
    return result


def log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The logarithm of the sum."""
    return x.sum(axes, keep).log()


def smallest_of(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The minimum; of nothing it is the largest number."""
    return torch.amin(x, axes, keep) if x.numel() else _of_nothing(x, axes, keep, largest=True)


def largest_of(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The maximum; of nothing it is the smallest number."""
    return torch.amax(x, axes, keep) if x.numel() else _of_nothing(x, axes, keep, largest=False)


def _of_nothing(x: Tensor, axes: Axes, keep: bool, *, largest: bool) -> Tensor:
    if x.is_floating_point():
        edge: float = float("inf") if largest else float("-inf")
    elif x.dtype == torch.bool:
        edge = largest
    else:
        edge = torch.iinfo(x.dtype).max if largest else torch.iinfo(x.dtype).min
    kept = [1 if axis in {a % x.ndim for a in axes} else size for axis, size in enumerate(x.shape)]
    result = x.new_full(kept, edge)
    return result if keep else _without(result, axes)


def _without(x: Tensor, axes: Axes) -> Tensor:
    return x.squeeze(axes) if axes else x


def plain_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    """The sum in the type of ``x``."""
    return torch.sum(x, axes, keep).to(x.dtype)


_REDUCERS: Final[dict[str, Any]] = {
    "ReduceL1": absolute_sum,
    "ReduceL2": length,
    "ReduceLogSum": log_sum,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": largest_of,
    "ReduceMean": torch.mean,
    "ReduceMin": smallest_of,
    "ReduceProd": product,
    "ReduceSum": plain_sum,
    "ReduceSumSquare": square_sum,
}


@operator(*_REDUCERS)
def reduce(op: Op) -> Call:
    """Without axes, all of them, or none where ``noop_with_empty_axes`` says so."""
    keep = bool(op.integer("keepdims", 1))
    axes = op.sizes(1) if op.given(1) else ()
    noop = bool(op.integer("noop_with_empty_axes", 0))
    if isinstance(axes, fx.Node):
        return Call(reduce_computed, (op.arg(0), axes, op.node.op_type, keep, noop))
    if axes:
        return Call(_REDUCERS[op.node.op_type], (op.arg(0), axes, keep))
    if noop:
        return Call(reduce_none, (op.arg(0), op.node.op_type))
    return Call(reduce_all, (op.arg(0), op.node.op_type, keep))


def reduce_all(x: Tensor, kind: str, keep: bool) -> Tensor:
    """The reduction called ``kind`` over every axis."""
    if not x.ndim:
        return reduce_none(x, kind)
    result: Tensor = _REDUCERS[kind](x, tuple(range(x.ndim)), keep)
    return result


def reduce_none(x: Tensor, kind: str) -> Tensor:
    """Every element reduced alone: what the reduction called ``kind`` does to one number."""
    result: Tensor = _REDUCERS[kind](x.unsqueeze(0), (0,), False)
    return result


def reduce_computed(x: Tensor, axes: Tensor, kind: str, keep: bool, noop: bool) -> Tensor:
    """The reduction over axes that are computed."""
    chosen = tuple(int(axis) for axis in axes.reshape(-1).tolist())
    if not chosen:
        return reduce_none(x, kind) if noop else reduce_all(x, kind, keep)
    result: Tensor = _REDUCERS[kind](x, chosen, keep)
    return result
