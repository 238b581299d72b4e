"""Order and running totals along one axis."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator


@operator("ArgMax", "ArgMin")
def arg_extreme(op: Op) -> Call:
    """The place of the first, or of the last, largest or smallest element."""
    keep, last = bool(op.integer("keepdims", 1)), bool(op.integer("select_last_index", 0))
    return Call(place_of, (op.arg(0), op.integer("axis", 0), keep, last, op.node.op_type == "ArgMax"))


def place_of(x: Tensor, axis: int, keep: bool, last: bool, largest: bool) -> Tensor:
    """int64 places along ``axis``; of equals the first, or the last."""
    find = torch.argmax if largest else torch.argmin
    if not last:
        return find(x, axis, keep)
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)


@operator("TopK")
def top_k(op: Op) -> Call:
    """The largest or smallest elements, sorted, of equals the first; and their places."""
    count = op.number_at(1)
    if isinstance(count, float):
        raise op.refuse("with a fractional number of elements")
    return Call(first_sorted, (op.arg(0), count, op.integer("axis", -1), bool(op.integer("largest", 1))), parts=True)


def first_sorted(x: Tensor, count: Tensor | int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The first ``count`` elements along ``axis`` once sorted, and their places, int64."""
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    wanted = int(count)
    return values.narrow(axis, 0, wanted), places.narrow(axis, 0, wanted)


@operator("CumSum", "CumProd")
def cumulative(op: Op) -> Call:
    """From either end, with or without the element itself."""
    axis = op.number_at(1)
    if axis is None or isinstance(axis, float):
        raise op.refuse("without a whole axis")
    exclusive, backwards = bool(op.integer("exclusive", 0)), bool(op.integer("reverse", 0))
    return Call(running, (op.arg(0), axis, exclusive, backwards, op.node.op_type == "CumProd"))


def running(x: Tensor, axis: Tensor | int, exclusive: bool, backwards: bool, product: bool) -> Tensor:
    """Running sums or products along ``axis``; ``exclusive`` leaves each element out of its own."""
    place = int(axis)
    if backwards:
        x = x.flip(place)
    total = (torch.cumprod if product else torch.cumsum)(x, place).to(x.dtype)
    if exclusive:
        first = torch.full_like(total.narrow(place, 0, 1), 1 if product else 0)
        total = torch.cat([first, total.narrow(place, 0, x.shape[place] - 1)], place)
    return total.flip(place) if backwards else total


@operator("ReverseSequence")
def reverse_sequence(op: Op) -> Call:
    """The first elements of each row in reverse order, as many as the row's length says."""
    batch, time = op.integer("batch_axis", 1), op.integer("time_axis", 0)
    return Call(reversed_rows, (op.arg(0), op.arg(1), batch, time))


def reversed_rows(x: Tensor, lengths: Tensor, batch: int, time: int) -> Tensor:
    """``x`` with the first ``lengths[i]`` elements along ``time`` of row ``i`` of ``batch`` reversed."""
    rows = x.movedim((batch, time), (0, 1))
    place = torch.arange(rows.shape[1], device=x.device).expand(rows.shape[:2])
    limit = lengths.to(place.device)[:, None]
    source = torch.where(place < limit, limit - 1 - place, place)
    index = source.reshape(*source.shape, *(1,) * (x.ndim - 2)).expand_as(rows)
    return torch.gather(rows, 1, index).movedim((0, 1), (batch, time))
