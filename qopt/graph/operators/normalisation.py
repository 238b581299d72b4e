"""Normalisation layers, with the statistics of inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator


@operator("BatchNormalization")
def batch_normalization(op: Op) -> Call:
    """By the stored mean and variance."""
    if op.uses_output(1) or op.integer("training_mode", 0):
        raise op.refuse("with its training outputs")
    scale, shift, mean, variance = (op.arg(index) for index in range(1, 5))
    epsilon = op.number("epsilon", 1e-5)
    return Call(F.batch_norm, (op.arg(0), mean, variance, scale, shift, False, 0.0, epsilon))


@operator("LayerNormalization")
def layer_normalization(op: Op) -> Call:
    """Over all axes from ``axis`` on; the mean and the inverse deviation where they are read."""
    axis, epsilon = op.integer("axis", -1), op.number("epsilon", 1e-5)
    inputs = (op.arg(0), op.arg(1), op.optional(2), axis, epsilon)
    if op.uses_output(1) or op.uses_output(2):
        return Call(normalized_with_statistics, inputs, parts=True)
    return Call(normalized, inputs)


def normalized(x: Tensor, scale: Tensor, shift: Tensor | None, axis: int, epsilon: float) -> Tensor:
    """Zero mean and unit variance over the axes from ``axis`` on, then scaled and shifted."""
    result = F.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    return result if shift is None else result + shift


def normalized_with_statistics(
    x: Tensor, scale: Tensor, shift: Tensor | None, axis: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalized`, the mean and one over the standard deviation."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return normalized(x, scale, shift, axis, epsilon), mean, torch.rsqrt(variance + epsilon)


@operator("RMSNormalization")
def rms_normalization(op: Op) -> Call:
    """By the root of the mean square over all axes from ``axis`` on."""
    return Call(rms_normalized, (op.arg(0), op.arg(1), op.integer("axis", -1), op.number("epsilon", 1e-5)))


def rms_normalized(x: Tensor, scale: Tensor, axis: int, epsilon: float) -> Tensor:
    """Mean square one over the axes from ``axis`` on, then scaled."""
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon) * scale


@operator("InstanceNormalization")
def instance_normalization(op: Op) -> Call:
    """Over the axes after the second, per image and channel."""
    return Call(instance_normalized, (op.arg(0), op.arg(1), op.arg(2), op.number("epsilon", 1e-5)))


def instance_normalized(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """Zero mean and unit variance over the axes after the second, then scaled and shifted per channel."""
    return F.instance_norm(x, weight=scale, bias=shift, use_input_stats=True, eps=epsilon)


@operator("GroupNormalization")
def group_normalization(op: Op) -> Call:
    """Scale and shift per channel, as from opset 21 on."""
    groups, epsilon = op.integer("num_groups", 1), op.number("epsilon", 1e-5)
    return Call(torch.group_norm, (op.arg(0), groups, op.arg(1), op.arg(2), epsilon))


@operator("LRN")
def local_response_normalization(op: Op) -> Call:
    """By the squares of ``size`` neighbouring channels (Krizhevsky et al. 2012, section 3.3)."""
    alpha, beta, bias = op.number("alpha", 1e-4), op.number("beta", 0.75), op.number("bias", 1.0)
    return Call(locally_normalized, (op.arg(0), op.integer("size", 1), alpha, beta, bias))


def locally_normalized(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """``x / (bias + alpha / size * sum of x^2 over size channels)^beta``."""
    channels = torch.movedim(x * x, 1, -1)
    padded = F.pad(channels, ((size - 1) // 2, size // 2))
    sums = torch.movedim(padded.unfold(-1, size, 1).sum(-1), -1, 1)
    return x / (bias + alpha / size * sums) ** beta


@operator("LpNormalization")
def lp_normalization(op: Op) -> Call:
    """By the 1- or 2-norm of one axis; what is all zeros stays so."""
    return Call(norm_divided, (op.arg(0), op.integer("axis", -1), op.integer("p", 2)))


def norm_divided(x: Tensor, axis: int, p: int) -> Tensor:
    """``x`` over its p-norm along ``axis``, 0 where that is 0."""
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(op: Op) -> Call:
    """To mean 0 and deviation 1 over axes, by default all but the channels."""
    axes = op.integers("axes")
    return Call(standardized, (op.arg(0), (0, 2, 3) if axes is None else axes))


def standardized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``(x - mean) / (deviation + 1e-9)``."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)
