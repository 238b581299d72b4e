"""Convolutions and affine maps: the operators that apply weights.

In every call the first three arguments are the activations, the weight as ONNX stores it, and the bias or None
(`torch.matmul` has no bias).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

CONV: Final[dict[int, Any]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_TRANSPOSED: Final[dict[int, Any]] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}

Ints = tuple[int, ...]


def window_axes(op: Op) -> int:
    """The number of axes that the window slides over, 1 to 3."""
    dims = op.dims(0)
    if dims is None or len(dims) not in (3, 4, 5):
        raise op.refuse("over anything but one to three axes")
    return len(dims) - 2


def window_pads(op: Op, kernel: Ints, strides: Ints, dilations: Ints) -> tuple[Ints, Ints]:
    """Padding before and after each axis, whether it is written down or asked for by ``auto_pad``."""
    mode, axes = op.text("auto_pad", "NOTSET"), len(kernel)
    if mode == "VALID":
        return (0,) * axes, (0,) * axes
    if mode == "NOTSET":
        pads = op.integers("pads") or (0,) * (2 * axes)
        return pads[:axes], pads[axes:]
    before, after = [], []
    for size, width, stride, dilation in zip((op.dims(0) or ())[2:], kernel, strides, dilations, strict=True):
        if size is None:
            raise op.refuse(f"with auto_pad={mode} on an image of unknown size")
        needed = (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size
        shifts = op.node.op_type not in ("Conv", "ConvInteger", "QLinearConv")
        if needed < 0 and shifts:  # ONNX Runtime shifts the windows of pools, of Conv it does not
            raise op.refuse(f"with auto_pad={mode} and strides wider than the window")
        low, high = halves(max(needed, 0), upper=mode == "SAME_UPPER")
        before.append(low)
        after.append(high)
    return tuple(before), tuple(after)


def halves(total: int, *, upper: bool) -> tuple[int, int]:
    """``total`` in two halves, the second the larger one where ``upper``, else the first."""
    smaller, larger = total // 2, total - total // 2
    return (smaller, larger) if upper else (larger, smaller)


def torch_pads(before: Ints, after: Ints) -> list[int]:
    """The order of `torch.nn.functional.pad`: last axis first, before and after each."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


@operator("Conv")
def conv(op: Op) -> Call:
    """Symmetric padding goes into torch's convolution, any other is a pad before it."""
    strides, before, after, dilations, groups = convolution_window(op)
    inputs = (op.arg(0), op.arg(1), op.optional(2), strides)
    if before == after:
        return Call(CONV[len(strides)], (*inputs, before, dilations, groups))
    return Call(conv_padded, (*inputs, before, after, dilations, groups))


def convolution_window(op: Op, weight: int = 1) -> tuple[Ints, Ints, Ints, Ints, int]:
    """Strides, padding before and after, dilations and groups; ``weight`` is the input that holds the weight."""
    axes = window_axes(op)
    strides, dilations = op.integers("strides") or (1,) * axes, op.integers("dilations") or (1,) * axes
    kernel = op.integers("kernel_shape") or _kernel(op, weight)
    return strides, *window_pads(op, kernel, strides, dilations), dilations, op.integer("group", 1)


def _kernel(op: Op, weight: int) -> Ints:
    dims = op.dims(weight)
    kernel = tuple(size for size in (dims or ())[2:] if size is not None)
    if len(kernel) != window_axes(op):
        raise op.refuse("with a weight of unknown shape")
    return kernel


def conv_padded(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, before: Ints, after: Ints, dilation: Ints, groups: int
) -> Tensor:
    """A convolution whose zero padding differs between the two ends of an axis."""
    padded = F.pad(x, torch_pads(before, after))
    result: Tensor = CONV[len(stride)](padded, weight, bias, stride, (0,) * len(stride), dilation, groups)
    return result


@operator("ConvTranspose")
def conv_transpose(op: Op) -> Call:
    """Padding crops the output, and is found from ``output_shape`` or ``auto_pad`` where these are given."""
    axes = window_axes(op)
    ones, zeros = (1,) * axes, (0,) * axes
    strides, dilations = op.integers("strides") or ones, op.integers("dilations") or ones
    extra, group = op.integers("output_padding") or zeros, op.integer("group", 1)
    before, after = _crops(op, strides, dilations, extra)
    inputs = (op.arg(0), op.arg(1), op.optional(2), strides)
    if before == after and min(before) >= 0:
        return Call(_TRANSPOSED[axes], (*inputs, before, extra, group, dilations))
    return Call(conv_transpose_cropped, (*inputs, before, after, extra, group, dilations))


def _crops(op: Op, strides: Ints, dilations: Ints, extra: Ints) -> tuple[Ints, Ints]:
    """What is cut from either end of each axis; less than zero where the output is longer than what is computed."""
    mode, wanted, axes = op.text("auto_pad", "NOTSET"), op.integers("output_shape"), len(strides)
    if wanted is None and mode in ("NOTSET", "VALID"):
        return window_pads(op, (1,) * axes, strides, dilations)
    kernel = op.integers("kernel_shape") or _kernel(op, 1)
    sizes = (op.dims(0) or ())[2:]
    before, after = [], []
    for axis, size in enumerate(sizes):
        if size is None:
            raise op.refuse("with output_shape or auto_pad on an image of unknown size")
        target = size * strides[axis] if wanted is None else wanted[len(wanted) - axes + axis]
        span = (kernel[axis] - 1) * dilations[axis] + 1
        total = strides[axis] * (size - 1) + extra[axis] + span - target
        if wanted is None:  # ONNX Runtime leaves the output shorter than asked, the specification does not
            total = max(total, 0)
        low, high = halves(total, upper=mode == "SAME_UPPER") if total > 0 else (0, total)
        before.append(low)
        after.append(high)
    return tuple(before), tuple(after)


def conv_transpose_cropped(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, before: Ints, after: Ints, extra: Ints, groups: int,
    dilation: Ints,
) -> Tensor:  # fmt: skip
    """A transposed convolution whose cropping differs between the two ends of an axis."""
    whole: Tensor = _TRANSPOSED[len(stride)](x, weight, bias, stride, (0,) * len(stride), extra, groups, dilation)
    return F.pad(whole, [-crop for crop in torch_pads(before, after)])


@operator("Gemm")
def gemm(op: Op) -> Call:
    """``alpha A' B' + beta C``; the plain forms are what linear layers export to."""
    transposed_left, transposed_right = bool(op.integer("transA", 0)), bool(op.integer("transB", 0))
    alpha, beta = op.number("alpha", 1.0), op.number("beta", 1.0)
    inputs = (op.arg(0), op.arg(1), op.optional(2))
    if transposed_left or alpha != 1.0 or beta != 1.0:
        return Call(scaled_product, (*inputs, transposed_left, transposed_right, alpha, beta))
    if not transposed_right:
        return Call(affine, inputs)
    dims = op.dims(2) if op.given(2) else ()
    return Call(F.linear if (dims is not None and len(dims) == 1) or not op.given(2) else linear_matrix_bias, inputs)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight + bias``, the weight stored as (inputs, outputs)."""
    product = torch.matmul(x, weight)
    return product if bias is None else product + bias


def linear_matrix_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, the bias of any shape that broadcasts."""
    return torch.matmul(x, weight.T) + bias


def scaled_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, transpose_x: bool, transpose_weight: bool, alpha: float, beta: float
) -> Tensor:
    """Gemm in full."""
    product = alpha * torch.matmul(x.T if transpose_x else x, weight.T if transpose_weight else weight)
    return product if bias is None else product + beta * bias


@operator("MatMul")
def matmul(op: Op) -> Call:
    """Of two tensors, either of which may be a weight."""
    return Call(torch.matmul, (op.arg(0), op.arg(1)))
