"""Pooling."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.convolution import CONV, Ints, torch_pads, window_axes, window_pads
from qopt.graph.operators.registry import Call, Op, operator

_MAX: Final[dict[int, Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: Final[dict[int, Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(op: Op) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Kernel, strides, dilations, padding before, padding after."""
    axes = window_axes(op)
    kernel = op.integers("kernel_shape")
    if kernel is None:
        raise op.refuse("without kernel_shape")
    strides, dilations = op.integers("strides") or (1,) * axes, op.integers("dilations") or (1,) * axes
    return kernel, strides, dilations, *window_pads(op, kernel, strides, dilations)


def _torch_can_pad(kernel: Ints, before: Ints, after: Ints) -> bool:
    return before == after and all(2 * pad <= size for pad, size in zip(before, kernel, strict=True))


def last_pads(sizes: Ints, kernel: Ints, stride: Ints, before: Ints, after: Ints, dilation: Ints, ceil: bool) -> Ints:
    """The padding after each axis with which windows end exactly at its end; less than zero where they end before.

    With ``ceil`` a last window may reach beyond the padding, but not begin there.
    """
    ends = []
    for size, width, step, low, high, gap in zip(sizes, kernel, stride, before, after, dilation, strict=True):
        span = (width - 1) * gap + 1
        room = size + low + high - span
        windows = (-(-room // step) if ceil else room // step) + 1
        if ceil and (windows - 1) * step >= size + low:
            windows -= 1
        ends.append((windows - 1) * step + span - size - low)
    return tuple(ends)


@operator("MaxPool")
def max_pool(op: Op) -> Call:
    """Padding counts as minus infinity."""
    if op.uses_output(1):
        raise op.refuse("with its indices output")
    kernel, strides, dilations, before, after = _window(op)
    ceil = bool(op.integer("ceil_mode", 0))
    if _torch_can_pad(kernel, before, after) and not op.is_integer(0):
        return Call(_MAX[len(kernel)], (op.arg(0), kernel, strides, before, dilations, ceil))
    return Call(max_pool_padded, (op.arg(0), kernel, strides, before, after, dilations, ceil))


def max_pool_padded(
    x: Tensor, kernel: Ints, stride: Ints, before: Ints, after: Ints, dilation: Ints, ceil: bool
) -> Tensor:
    """Maximum over windows that may reach over either end of an axis by different amounts; integers stay exact."""
    values = x if x.is_floating_point() else x.to(torch.float64)
    ends = last_pads(tuple(x.shape[2:]), kernel, stride, before, after, dilation, ceil)
    padded = F.pad(values, torch_pads(before, ends), value=float("-inf"))
    result: Tensor = _MAX[len(kernel)](padded, kernel, stride, (0,) * len(kernel), dilation)
    return result.to(x.dtype)


@operator("AveragePool")
def average_pool(op: Op) -> Call:
    """Padding counts or not, by ``count_include_pad``."""
    kernel, strides, dilations, before, after = _window(op)
    ceil, counts = bool(op.integer("ceil_mode", 0)), bool(op.integer("count_include_pad", 0))
    if _torch_can_pad(kernel, before, after) and max(dilations) == 1:
        return Call(_AVERAGE[len(kernel)], (op.arg(0), kernel, strides, before, ceil, counts))
    return Call(average_pool_padded, (op.arg(0), kernel, strides, before, after, dilations, ceil, counts))


def average_pool_padded(
    x: Tensor, kernel: Ints, stride: Ints, before: Ints, after: Ints, dilation: Ints, ceil: bool, counts: bool
) -> Tensor:
    """Mean over windows that may reach over either end of an axis by different amounts.

    The padding that is written down counts where ``counts``; what a last window reaches beyond it never does.
    """
    ends = last_pads(tuple(x.shape[2:]), kernel, stride, before, after, dilation, ceil)
    total = window_sum(F.pad(x, torch_pads(before, ends)), kernel, stride, dilation)
    ones = torch.ones_like(x[:1, :1])
    if counts:
        ones = F.pad(ones, torch_pads(before, after), value=1.0)
        beyond = tuple(end - pad for end, pad in zip(ends, after, strict=True))
        ones = F.pad(ones, torch_pads((0,) * len(kernel), beyond))
    else:
        ones = F.pad(ones, torch_pads(before, ends))
    return total / window_sum(ones, kernel, stride, dilation)


def window_sum(x: Tensor, kernel: Ints, stride: Ints, dilation: Ints) -> Tensor:
    """The sum over every window that lies within ``x``."""
    axes = len(kernel)
    if max(dilation) == 1:
        mean: Tensor = _AVERAGE[axes](x, kernel, stride)
        return mean * prod(kernel)
    maps = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    result: Tensor = CONV[axes](maps, ones, None, stride, (0,) * axes, dilation)
    return result.reshape(*x.shape[:2], *result.shape[2:])


@operator("LpPool")
def lp_pool(op: Op) -> Call:
    """The p-norm of every window."""
    kernel, strides, dilations, before, after = _window(op)
    ceil = bool(op.integer("ceil_mode", 0))
    return Call(norm_pooled, (op.arg(0), op.integer("p", 2), kernel, strides, before, after, dilations, ceil))


def norm_pooled(
    x: Tensor, p: int, kernel: Ints, stride: Ints, before: Ints, after: Ints, dilation: Ints, ceil: bool
) -> Tensor:
    """``(sum |x|^p)^(1/p)`` over windows; padding is zero."""
    ends = last_pads(tuple(x.shape[2:]), kernel, stride, before, after, dilation, ceil)
    powers = F.pad(x.abs() ** p, torch_pads(before, ends))
    return window_sum(powers, kernel, stride, dilation) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(op: Op) -> Call:
    """Mean over all axes after the second."""
    return Call(torch.mean, (op.arg(0), _spatial(op), True))


@operator("GlobalMaxPool")
def global_max_pool(op: Op) -> Call:
    """Maximum over all axes after the second."""
    return Call(torch.amax, (op.arg(0), _spatial(op), True))


@operator("GlobalLpPool")
def global_lp_pool(op: Op) -> Call:
    """The p-norm over all axes after the second."""
    return Call(torch.linalg.vector_norm, (op.arg(0), op.integer("p", 2), _spatial(op), True))


def _spatial(op: Op) -> Ints:
    dims = op.dims(0)
    if dims is None or len(dims) < 3:
        raise op.refuse("on a tensor of unknown rank")
    return tuple(range(2, len(dims)))
