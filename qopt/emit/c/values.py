"""What the reader asks of ONNX nodes: sizes of one image, attributes, windows."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from qopt.emit.c.steps import Tensor, Window
from qopt.errors import UnsupportedModelError

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Transpose"})
"""Operators that only name the same codes anew; a Transpose where it moves no two axes longer than 1."""

MANY = 2**31 - 1
"""As the end of a slice: all there is."""


def refuse(node: ir.Node, what: str, *, fix: str | None = None) -> UnsupportedModelError:
    """The error that names a node and its operator."""
    return UnsupportedModelError(f"{node.op_type} {what}", where=f"node {node.name!r}", fix=fix)


def sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape of one image's part of ``value``: without its first axis.

    Raises:
        UnsupportedModelError: where it is unknown, naming the value.
    """
    dims = tuple(value.shape)[1:] if value.shape is not None and len(value.shape) else (None,)
    known = tuple(dim for dim in dims if isinstance(dim, int))
    if len(known) != len(dims) or not prod(known):
        raise UnsupportedModelError(
            "C code needs every size but the batch", where=f"value {value.name!r}", got=str(value.shape),
            fix="export the model with fixed image sizes",
        )  # fmt: skip
    return known


def number(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def numbers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An attribute of integers."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def constant(node: ir.Node, position: int) -> tuple[float, ...] | None:
    """The numbers of a constant input; empty where the input is left out, None where it is computed."""
    value = node.inputs[position] if len(node.inputs) > position else None
    if value is None:
        return ()
    return None if value.const_value is None else tuple(float(x) for x in value.const_value.numpy().reshape(-1))


def window(node: ir.Node, source: Tensor, kernel: tuple[int, ...], groups: int = 1) -> tuple[Window, tuple[int, int]]:
    """The windows of a convolution or a pool, and the padding below and to the right."""
    axes = len(source.shape) - 1
    if axes not in (1, 2) or len(kernel) != axes:
        raise refuse(node, "over anything but one or two axes is not in C code")
    strides = numbers(node, "strides") or (1,) * axes
    dilations = numbers(node, "dilations") or (1,) * axes
    before, after = _pads(node, source.shape[1:], kernel, strides, dilations)
    out = sizes(node.outputs[0])[1:]
    plane, kernel, strides, dilations, before, after, out = (
        (fill,) * (2 - axes) + tuple(values)
        for fill, values in (
            (1, source.shape[1:]), (1, kernel), (1, strides), (1, dilations), (0, before), (0, after), (1, out)
        )
    )  # fmt: skip
    return (
        Window(source.shape[0] // groups, *plane, *out, *kernel, *strides, *dilations, *before),
        (after[0], after[1]),
    )


def whole(node: ir.Node, source: Tensor) -> Window:
    """One window over each plane."""
    if len(source.shape) not in (2, 3):
        raise refuse(node, "over anything but one or two axes is not in C code")
    height, width = (1, *source.shape[1:])[-2:]
    return Window(source.shape[0], height, width, 1, 1, height, width)


def _pads(
    node: ir.Node, plane: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    attribute = node.attributes.get("auto_pad")
    mode, axes = "NOTSET" if attribute is None else attribute.as_string(), len(kernel)
    if mode == "VALID":
        return (0,) * axes, (0,) * axes
    if mode == "NOTSET":
        pads = numbers(node, "pads") or (0,) * (2 * axes)
        if min(pads) < 0:
            raise refuse(node, "with negative padding is not in C code")
        return pads[:axes], pads[axes:]
    totals = [
        max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, width, stride, dilation in zip(plane, kernel, strides, dilations, strict=True)
    ]
    smaller, larger = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)


def keeps_order(node: ir.Node, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a view leaves the elements of an image where they are."""
    if node.op_type != "Transpose":
        return prod(source) == prod(target)
    order = numbers(node, "perm") or tuple(range(len(source), -1, -1))
    moved = [axis for axis in order[1:] if source[axis - 1] > 1]
    return order[0] == 0 and moved == sorted(moved)


def box(
    node: ir.Node, source: tuple[int, ...], target: tuple[int, ...]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Where a Slice or a Pad by zeros begins in its source, and its steps, for the last three axes of an image."""
    rank = len(source)
    starts, steps = [0] * rank, [1] * rank
    given = constant(node, 1)
    axes = constant(node, 3)
    if given is None or axes is None or rank > 3 or rank != len(target):
        raise refuse(node, "of computed sizes or more than three axes is not in C code")
    if node.op_type == "Slice":
        strides = constant(node, 4) or (1.0,) * len(given)
        for i, (start, step) in enumerate(zip(given, strides, strict=True)):
            axis = int(axes[i]) % (rank + 1) if axes else i
            if axis == 0 and start == 0 and step == 1 and (ends := constant(node, 2)) and ends[i] >= MANY:
                continue  # every image
            if axis == 0 or step < 1:
                raise refuse(node, "of images or backwards is not in C code")
            size = source[axis - 1]
            starts[axis - 1] = min(max(int(start) + (size if start < 0 else 0), 0), size)
            steps[axis - 1] = int(step)
    else:
        mode, value = node.attributes.get("mode"), constant(node, 2)
        places = [int(axis) % (rank + 1) for axis in axes] if axes else list(range(rank + 1))
        before = dict(zip(places, given, strict=False))
        zeros = value is not None and not any(value) and (mode is None or mode.as_string() == "constant")
        if not zeros or before.get(0):
            raise refuse(node, "by anything but zeros around an image is not in C code")
        starts = [-int(before.get(axis + 1, 0)) for axis in range(rank)]
    first = (0,) * (3 - rank)
    begin, stride = (*first, *starts), (*(1,) * (3 - rank), *steps)
    return (begin[0], begin[1], begin[2]), (stride[0], stride[1], stride[2])
