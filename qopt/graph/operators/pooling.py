"""Pooling."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.convolution import Ints, torch_pads, window_axes, window_pads
from qopt.graph.operators.registry import Call, Op, operator

_MAX: Final[dict[int, Any]] = {1: F.max_pool1d, 2: F.max_pool2d}
_AVERAGE: Final[dict[int, Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d}


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


@operator("MaxPool")
def max_pool(op: Op) -> Call:
    """Padding counts as minus infinity."""
    if op.uses_output(1):
        raise op.refuse("with its indices output")
    kernel, strides, dilations, before, after = _window(op)
    ceil = bool(op.integer("ceil_mode", 0))
    if _torch_can_pad(kernel, before, after):
        return Call(_MAX[len(kernel)], (op.arg(0), kernel, strides, before, dilations, ceil))
    if ceil:
        raise op.refuse("with ceil_mode and uneven padding")
    return Call(max_pool_padded, (op.arg(0), kernel, strides, before, after, dilations))


def max_pool_padded(x: Tensor, kernel: Ints, stride: Ints, before: Ints, after: Ints, dilation: Ints) -> Tensor:
    """Maximum over windows that may reach over either end of an axis by different amounts."""
    padded = F.pad(x, torch_pads(before, after), value=float("-inf"))
    result: Tensor = _MAX[len(kernel)](padded, kernel, stride, (0,) * len(kernel), dilation)
    return result


@operator("AveragePool")
def average_pool(op: Op) -> Call:
    """Padding counts or not, by ``count_include_pad``."""
    kernel, strides, dilations, before, after = _window(op)
    ceil, counts = bool(op.integer("ceil_mode", 0)), bool(op.integer("count_include_pad", 0))
    if any(dilation != 1 for dilation in dilations):
        raise op.refuse("with dilations")
    if _torch_can_pad(kernel, before, after):
        return Call(_AVERAGE[len(kernel)], (op.arg(0), kernel, strides, before, ceil, counts))
    if ceil:
        raise op.refuse("with ceil_mode and uneven padding")
    return Call(average_pool_padded, (op.arg(0), kernel, strides, before, after, counts))


def average_pool_padded(x: Tensor, kernel: Ints, stride: Ints, before: Ints, after: Ints, counts: bool) -> Tensor:
    """Mean over windows that may reach over either end of an axis by different amounts."""
    pool, pads = _AVERAGE[len(kernel)], torch_pads(before, after)
    mean: Tensor = pool(F.pad(x, pads), kernel, stride)
    return mean if counts else mean / pool(F.pad(torch.ones_like(x[:1, :1]), pads), kernel, stride)


@operator("GlobalAveragePool")
def global_average_pool(op: Op) -> Call:
    """Mean over all axes after the second."""
    return Call(torch.mean, (op.arg(0), _spatial(op), True))


@operator("GlobalMaxPool")
def global_max_pool(op: Op) -> Call:
    """Maximum over all axes after the second."""
    return Call(torch.amax, (op.arg(0), _spatial(op), True))


def _spatial(op: Op) -> Ints:
    dims = op.dims(0)
    if dims is None or len(dims) < 3:
        raise op.refuse("on a tensor of unknown rank")
    return tuple(range(2, len(dims)))
