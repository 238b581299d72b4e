"""Reading and writing by indices, and indices of what is there."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

_REDUCTIONS: Final = {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _counted_from_start(index: Tensor, size: int) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@operator("GatherElements")
def gather_elements(op: Op) -> Call:
    """One element per index, along one axis."""
    return Call(gathered_elements, (op.arg(0), op.arg(1), op.integer("axis", 0)))


def gathered_elements(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """``x`` with its place along ``axis`` taken from ``index``; negative indices count from the end."""
    return torch.gather(x, axis, _counted_from_start(index, x.shape[axis]))


@operator("ScatterElements")
def scatter_elements(op: Op) -> Call:
    """One element per index, along one axis, written or combined."""
    inputs = (op.arg(0), op.arg(1), op.arg(2), op.integer("axis", 0))
    return Call(scattered_elements, (*inputs, _reduction(op)))


def _reduction(op: Op) -> str | None:
    name = op.text("reduction", "none")
    if name not in _REDUCTIONS:
        raise op.refuse(f"with reduction={name}")
    return _REDUCTIONS[name]


def scattered_elements(x: Tensor, index: Tensor, updates: Tensor, axis: int, reduction: str | None) -> Tensor:
    """``x`` with ``updates`` at ``index`` along ``axis``, or combined with what is there by ``reduction``."""
    index = _counted_from_start(index, x.shape[axis])
    if reduction is None:
        return torch.scatter(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, reduction, include_self=True)


@operator("GatherND")
def gather_nd(op: Op) -> Call:
    """Slices by vectors of indices, after ``batch_dims`` axes that both share."""
    return Call(gathered_slices, (op.arg(0), op.arg(1), op.integer("batch_dims", 0)))


def gathered_slices(x: Tensor, index: Tensor, shared: int) -> Tensor:
    """``x[b, index[b, ...]]`` for every ``b`` over the first ``shared`` axes."""
    width = index.shape[-1]
    batch = prod(x.shape[:shared])
    sizes = x.shape[shared : shared + width]
    rows = x.reshape(batch, prod(sizes), *x.shape[shared + width :])
    flat = _flat_index(index, sizes).reshape(batch, -1)
    picked = rows[torch.arange(batch, device=x.device)[:, None], flat]
    return picked.reshape(*index.shape[:-1], *x.shape[shared + width :])


def _flat_index(index: Tensor, sizes: torch.Size) -> Tensor:
    """Vectors of indices as places in the flattened axes of ``sizes``."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for place, size in enumerate(sizes):
        flat = flat * size + _counted_from_start(index[..., place], size)
    return flat


@operator("ScatterND")
def scatter_nd(op: Op) -> Call:
    """Slices by vectors of indices, written or combined."""
    return Call(scattered_slices, (op.arg(0), op.arg(1), op.arg(2), _reduction(op)))


def scattered_slices(x: Tensor, index: Tensor, updates: Tensor, reduction: str | None) -> Tensor:
    """``x`` with the slices ``x[index[...]]`` replaced by ``updates``, or combined with them by ``reduction``."""
    width = index.shape[-1]
    sizes = x.shape[:width]
    flat = _flat_index(index, sizes).reshape(-1)
    rows = x.reshape(prod(sizes), -1)
    places = flat[:, None].expand(-1, rows.shape[1])
    return scattered_elements(rows, places, updates.reshape(places.shape), 0, reduction).reshape(x.shape)


@operator("OneHot")
def one_hot(op: Op) -> Call:
    """A new axis, ``on`` at the index and ``off`` elsewhere; an index out of range is nowhere."""
    return Call(hot, (op.arg(0), op.number_at(1), op.arg(2), op.integer("axis", -1)))


def hot(index: Tensor, depth: Tensor | float, values: Tensor, axis: int) -> Tensor:
    """``values[1]`` where the place along the new ``axis``, of size ``depth``, is the index, else ``values[0]``."""
    count = int(depth)
    place = axis % (index.ndim + 1)
    wanted = torch.where(index < 0, index + count, index).unsqueeze(place)
    steps = torch.arange(count, device=index.device).reshape(-1, *(1,) * (index.ndim - place))
    return torch.where(wanted == steps, values[1], values[0])


@operator("NonZero")
def non_zero(op: Op) -> Call:
    """The indices of what is not zero, one column each; their number is known once the twin runs."""
    return Call(non_zero_indices, (op.arg(0),))


def non_zero_indices(x: Tensor) -> Tensor:
    """int64 (axes, elements that are not zero), in row order."""
    return torch.nonzero(x).T


@operator("Compress")
def compress(op: Op) -> Call:
    """The slices, or the elements of the flattened tensor, that a condition selects."""
    axis: Any = op.integer("axis", 0) if op.has("axis") else None
    return Call(selected, (op.arg(0), op.arg(1), axis))


def selected(x: Tensor, condition: Tensor, axis: int | None) -> Tensor:
    """``x`` where ``condition`` holds along ``axis``; a condition may be shorter than the axis."""
    places = torch.nonzero(condition).reshape(-1)
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)
