"""Normalisation layers, with the statistics of inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator


@operator("BatchNormalization")
def batch_normalization(op: Op) -> Call:
    """By the stored mean and variance."""
    if op.uses_output(1):
        raise op.refuse("with its training outputs")
    scale, shift, mean, variance = (op.arg(index) for index in range(1, 5))
    epsilon = op.number("epsilon", 1e-5)
    return Call(F.batch_norm, (op.arg(0), mean, variance, scale, shift, False, 0.0, epsilon))


@operator("LayerNormalization")
def layer_normalization(op: Op) -> Call:
    """Over all axes from ``axis`` on."""
    if op.uses_output(1) or op.uses_output(2):
        raise op.refuse("with its statistics outputs")
    axis, epsilon = op.integer("axis", -1), op.number("epsilon", 1e-5)
    return Call(normalized, (op.arg(0), op.arg(1), op.optional(2), axis, epsilon))


def normalized(x: Tensor, scale: Tensor, shift: Tensor | None, axis: int, epsilon: float) -> Tensor:
    """Zero mean and unit variance over the axes from ``axis`` on, then scaled and shifted."""
    result = F.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    return result if shift is None else result + shift


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
