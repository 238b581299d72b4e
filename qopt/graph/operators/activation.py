"""Activations."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

_PLAIN: Final[dict[str, Any]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Erf": torch.erf,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Mish": F.mish,
}


@operator(*_PLAIN)
def plain(op: Op) -> Call:
    """Functions without parameters."""
    return Call(_PLAIN[op.node.op_type], (op.arg(0),))


@operator("LeakyRelu")
def leaky_relu(op: Op) -> Call:
    """``x`` or ``alpha x``."""
    return Call(F.leaky_relu, (op.arg(0), op.number("alpha", 0.01)))


@operator("ThresholdedRelu")
def thresholded_relu(op: Op) -> Call:
    """``x`` above ``alpha``, else 0."""
    return Call(F.threshold, (op.arg(0), op.number("alpha", 1.0), 0.0))


@operator("Shrink")
def shrink(op: Op) -> Call:
    """Nearer to zero by ``bias`` where further from it than ``lambd``, else 0."""
    return Call(shrunk, (op.arg(0), op.number("lambd", 0.5), op.number("bias", 0.0)))


def shrunk(x: Tensor, limit: float, bias: float) -> Tensor:
    """``x + bias`` below ``-limit``, ``x - bias`` above ``limit``, 0 between."""
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("PRelu")
def prelu(op: Op) -> Call:
    """``x`` or ``slope x``, the slope broadcast to x."""
    return Call(sloped, (op.arg(0), op.arg(1)))


def sloped(x: Tensor, slope: Tensor) -> Tensor:
    """``x`` where positive, else ``slope * x``."""
    return torch.where(x > 0, x, slope * x)


@operator("Elu")
def elu(op: Op) -> Call:
    """``x`` or ``alpha (exp(x) - 1)``."""
    return Call(F.elu, (op.arg(0), op.number("alpha", 1.0)))


@operator("Celu")
def celu(op: Op) -> Call:
    """``x`` or ``alpha (exp(x / alpha) - 1)``."""
    return Call(F.celu, (op.arg(0), op.number("alpha", 1.0)))


@operator("Selu")
def selu(op: Op) -> Call:
    """Scaled elu, with the constants as attributes."""
    alpha = op.number("alpha", 1.67326319217681884765625)
    return Call(scaled_elu, (op.arg(0), alpha, op.number("gamma", 1.05070102214813232421875)))


def scaled_elu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """``gamma * elu(x, alpha)``."""
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(op: Op) -> Call:
    """``clip(alpha x + beta, 0, 1)``."""
    return Call(clipped_line, (op.arg(0), op.number("alpha", 0.2), op.number("beta", 0.5)))


def clipped_line(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta``, clipped to [0, 1]."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("Gelu")
def gelu(op: Op) -> Call:
    """Exact, or by tanh."""
    return Call(F.gelu, (op.arg(0),), {"approximate": op.text("approximate", "none")})


@operator("Swish")
def swish(op: Op) -> Call:
    """``x sigmoid(alpha x)``."""
    return Call(swished, (op.arg(0), op.number("alpha", 1.0)))


def swished(x: Tensor, alpha: float) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return x * torch.sigmoid(alpha * x)


@operator("SwiGLU")
def swiglu(op: Op) -> Call:
    """The second input gated by the first, ``a sigmoid(alpha a) b``."""
    return Call(gated, (op.arg(0), op.arg(1), op.number("alpha", 1.0)))


def gated(gate: Tensor, x: Tensor, alpha: float) -> Tensor:
    """``swished(gate) * x``."""
    return swished(gate, alpha) * x


@operator("Clip")
def clip(op: Op) -> Call:
    """Bounds are optional inputs; constant ones become numbers."""
    low, high = _bound(op, 1), _bound(op, 2)
    if low is None and high is None:
        return Call(torch.clone, (op.arg(0),))
    if isinstance(low, (float, int)) and isinstance(high, (float, int)) and low > high:
        return Call(torch.clamp, (op.arg(0), high, high))  # ONNX: the upper bound wins
    both_known = all(bound is None or isinstance(bound, (float, int)) for bound in (low, high))
    return Call(torch.clamp if both_known else clip_computed, (op.arg(0), low, high))


def _bound(op: Op, index: int) -> Any:
    if not op.given(index):
        return None
    array = op.const(index)
    return op.arg(index) if array is None else array.item()


def clip_computed(x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    """Clip to bounds that may be tensors."""
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))


@operator("Softmax")
def softmax(op: Op) -> Call:
    """Over one axis, the last by default."""
    return Call(torch.softmax, (op.arg(0), op.integer("axis", -1)))


@operator("LogSoftmax")
def log_softmax(op: Op) -> Call:
    """Over one axis, the last by default."""
    return Call(torch.log_softmax, (op.arg(0), op.integer("axis", -1)))


@operator("Hardmax")
def hardmax(op: Op) -> Call:
    """1 at the first largest element of an axis, 0 elsewhere; no gradient passes."""
    return Call(first_largest, (op.arg(0), op.integer("axis", -1)))


def first_largest(x: Tensor, axis: int) -> Tensor:
    """1 at the first largest element along ``axis``, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)
