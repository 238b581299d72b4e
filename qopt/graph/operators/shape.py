"""Operators that move, cut and join data, and arithmetic on shapes (which runs on small integer tensors)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qopt.graph.operators.registry import Call, Op, operator

Sizes = Tensor | tuple[int, ...]


def numbers(sizes: Sizes) -> list[int]:
    """Sizes as integers, whether they were known or computed."""
    return [int(size) for size in (sizes.reshape(-1).tolist() if isinstance(sizes, Tensor) else sizes)]


@operator("Identity")
def identity(op: Op) -> Call:
    """Nothing."""
    return Call(torch.clone, (op.arg(0),))


@operator("Dropout")
def dropout(op: Op) -> Call:
    """Nothing; the mask is all ones."""
    training = op.const(2) if op.given(2) else np.array(False)
    if training is None or training.any():
        raise op.refuse("in training mode")
    if op.uses_output(1):
        return Call(kept, (op.arg(0),), parts=True)
    return Call(torch.clone, (op.arg(0),))


def kept(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and a mask that keeps all of it."""
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


@operator("Reshape")
def reshape(op: Op) -> Call:
    """A 0 copies the size at its place unless ``allowzero``."""
    target = op.sizes(1)
    if not isinstance(target, fx.Node) and 0 not in target:
        return Call(torch.reshape, (op.arg(0), target))
    return Call(reshape_like, (op.arg(0), target, bool(op.integer("allowzero", 0))))


def reshape_like(x: Tensor, shape: Sizes, allowzero: bool) -> Tensor:
    """Reshape by ONNX's rules."""
    sizes = numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(op: Op) -> Call:
    """To a matrix, split at ``axis``."""
    axis = op.integer("axis", 1)
    return Call(torch.flatten, (op.arg(0), 1)) if axis == 1 and _rank(op) > 1 else Call(as_matrix, (op.arg(0), axis))


def _rank(op: Op) -> int:
    dims = op.dims(0)
    return -1 if dims is None else len(dims)


def as_matrix(x: Tensor, axis: int) -> Tensor:
    """Axes before ``axis`` become rows, the others columns."""
    axis = axis % x.ndim if axis < 0 else axis
    rows = int(torch.Size(x.shape[:axis]).numel())
    return x.reshape(rows, int(torch.Size(x.shape[axis:]).numel()))


@operator("Transpose")
def transpose(op: Op) -> Call:
    """All axes reversed by default."""
    order = op.integers("perm")
    return Call(reverse_axes, (op.arg(0),)) if order is None else Call(torch.permute, (op.arg(0), order))


def reverse_axes(x: Tensor) -> Tensor:
    """``x`` with its axes in reverse order."""
    return x.permute(tuple(reversed(range(x.ndim))))


@operator("Squeeze")
def squeeze(op: Op) -> Call:
    """The given axes, or every axis of size 1."""
    axes = op.sizes(1) if op.given(1) else None
    if isinstance(axes, fx.Node):
        return Call(squeeze_all, (op.arg(0), axes))
    return Call(torch.squeeze, (op.arg(0),) if axes is None else (op.arg(0), axes))


def squeeze_all(x: Tensor, axes: Sizes) -> Tensor:
    """``x`` without the axes of size 1 that are computed."""
    return x.squeeze(tuple(numbers(axes)))


@operator("Unsqueeze")
def unsqueeze(op: Op) -> Call:
    """Axes count in the result."""
    axes = op.sizes(1)
    if isinstance(axes, fx.Node) or len(axes) != 1:
        return Call(unsqueeze_all, (op.arg(0), axes))
    return Call(torch.unsqueeze, (op.arg(0), axes[0]))


def unsqueeze_all(x: Tensor, axes: Sizes) -> Tensor:
    """New axes of size 1 at places counted in the result."""
    places = numbers(axes)
    rank = x.ndim + len(places)
    for axis in sorted(axis % rank for axis in places):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def expand(op: Op) -> Call:
    """Broadcast both ways."""
    return Call(broadcast, (op.arg(0), op.sizes(1)))


def broadcast(x: Tensor, shape: Sizes) -> Tensor:
    """``x`` at the shape that it and ``shape`` broadcast to."""
    common = torch.broadcast_shapes(x.shape, torch.Size(numbers(shape)))  # type: ignore[no-untyped-call]
    return torch.broadcast_to(x, common)


@operator("Tile")
def tile(op: Op) -> Call:
    """Repeat along each axis."""
    return Call(repeat, (op.arg(0), op.sizes(1)))


def repeat(x: Tensor, times: Sizes) -> Tensor:
    """``x`` repeated along each axis."""
    return torch.tile(x, numbers(times))


@operator("Shape")
def shape(op: Op) -> Call:
    """The sizes from ``start`` to ``end``."""
    end = op.node.attributes.get("end")
    return Call(shape_of, (op.arg(0), op.integer("start", 0), None if end is None else end.as_int()))


def shape_of(x: Tensor, start: int, end: int | None) -> Tensor:
    """Sizes as an int64 vector beside ``x``, so that arithmetic with stored constants stays on one device."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


@operator("Size")
def size(op: Op) -> Call:
    """The number of elements."""
    return Call(size_of, (op.arg(0),))


def size_of(x: Tensor) -> Tensor:
    """The number of elements as an int64 scalar."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


@operator("ConstantOfShape")
def constant_of_shape(op: Op) -> Call:
    """Zeros of float32 by default."""
    value = op.tensor("value")
    number: Any = 0.0 if value is None else value.reshape(-1)[0].item()
    dtype = torch.float32 if value is None else torch.from_numpy(value.reshape(-1)[:1].copy()).dtype
    return Call(filled, (op.arg(0), number, dtype))


def filled(shape: Tensor, number: float, dtype: torch.dtype) -> Tensor:
    """A constant tensor of a computed shape."""
    return torch.full(numbers(shape), number, dtype=dtype, device=shape.device)


@operator("Range")
def arange(op: Op) -> Call:
    """From start to limit by delta."""
    return Call(counted, (op.arg(0), op.arg(1), op.arg(2)))


def counted(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """``start, start + delta, ...`` below ``limit``."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@operator("Concat")
def concat(op: Op) -> Call:
    """Along one axis."""
    return Call(torch.cat, (op.args(), op.integer("axis", 0)))


@operator("Split")
def split(op: Op) -> Call:
    """Into given sizes, or into equal parts of which the last may be smaller."""
    axis, sizes = op.integer("axis", 0), op.sizes(1) if op.given(1) else None
    if isinstance(sizes, fx.Node):
        return Call(split_by, (op.arg(0), sizes, axis), parts=True)
    if sizes is not None:
        return Call(torch.split, (op.arg(0), list(sizes), axis), parts=True)
    count = op.integer("num_outputs", len(op.node.outputs))
    return Call(split_evenly, (op.arg(0), count, axis), parts=True)


def split_by(x: Tensor, sizes: Sizes, axis: int) -> tuple[Tensor, ...]:
    """Pieces of sizes that are computed."""
    return torch.split(x, numbers(sizes), axis)


def split_evenly(x: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
    """``parts`` pieces of equal size, the last one smaller where it does not divide."""
    return torch.split(x, -(-x.shape[axis] // parts), axis)


@operator("Slice")
def slice_(op: Op) -> Call:
    """Starts, ends, axes and steps may be constant or computed."""
    axes, steps = (op.sizes(index) if op.given(index) else None for index in (3, 4))
    return Call(sliced, (op.arg(0), op.sizes(1), op.sizes(2), axes, steps))


def sliced(x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None, steps: Sizes | None) -> Tensor:
    """Python's slicing along each axis, negative steps included."""
    first, last = numbers(starts), numbers(ends)
    places = range(len(first)) if axes is None else numbers(axes)
    strides = [1] * len(first) if steps is None else numbers(steps)
    for start, end, place, step in zip(first, last, places, strides, strict=True):
        axis = place % x.ndim
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            x = x[(slice(None),) * axis + (slice(chosen.start, chosen.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


@operator("Gather")
def gather(op: Op) -> Call:
    """Whole slices along one axis by indices of any shape."""
    axis, index = op.integer("axis", 0), op.const(1)
    if index is not None and index.ndim == 0:
        return Call(torch.select, (op.arg(0), axis, int(index)))
    return Call(gathered, (op.arg(0), op.arg(1), axis))


def gathered(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """``x`` at ``index`` along ``axis``; negative indices count from the end."""
    axis = axis % x.ndim
    flat = index.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


@operator("Pad")
def pad(op: Op) -> Call:
    """By a constant, by the edge, mirrored or going round."""
    mode, value = op.text("mode", "constant"), op.number_at(2)
    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise op.refuse(f"with mode={mode}")
    pads, axes = op.sizes(1), op.sizes(3) if op.given(3) else None
    number = 0 if value is None else value
    if isinstance(pads, fx.Node) or isinstance(axes, fx.Node) or isinstance(number, fx.Node):
        return Call(padded_by, (op.arg(0), pads, axes, mode, number))
    count = len(pads) // 2
    places = tuple(range(count)) if axes is None else axes
    return Call(padded, (op.arg(0), pads[:count], pads[count:], places, mode, number))


def padded_by(x: Tensor, pads: Sizes, axes: Sizes | None, mode: str, number: Tensor | float) -> Tensor:
    """`padded` by what is computed."""
    amounts = tuple(numbers(pads))
    count = len(amounts) // 2
    places = tuple(range(count)) if axes is None else tuple(numbers(axes))
    return padded(x, amounts[:count], amounts[count:], places, mode, float(number))


def padded(
    x: Tensor, before: tuple[int, ...], after: tuple[int, ...], axes: tuple[int, ...], mode: str, number: float
) -> Tensor:
    """``x`` with each of ``axes`` longer at both ends, or shorter for negative amounts."""
    if mode != "constant":
        for axis, low, high in zip(axes, before, after, strict=True):
            x = x.index_select(axis, _border(x.shape[axis], low, high, mode).to(x.device))
        return x
    amounts = [0] * (2 * x.ndim)
    for axis, low, high in zip(axes, before, after, strict=True):
        place = 2 * (x.ndim - 1 - axis % x.ndim)
        amounts[place : place + 2] = [low, high]
    return F.pad(x, amounts, value=number)


def _border(size: int, low: int, high: int, mode: str) -> Tensor:
    """Where each element of a padded axis comes from."""
    index = torch.arange(-low, size + high)
    if mode == "wrap":
        return index % size
    if mode == "edge" or size == 1:
        return index.clamp(0, size - 1)
    period = 2 * (size - 1)
    index = index % period
    return torch.minimum(index, period - index)
