"""Elementwise arithmetic, comparisons and logic."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator
from qopt.graph.operators.types import code_range

_UNARY: Final[dict[str, Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}

_BINARY: Final[dict[str, Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}


@operator(*_UNARY)
def unary(op: Op) -> Call:
    """One tensor."""
    return Call(_UNARY[op.node.op_type], (op.arg(0),))


@operator(*_BINARY)
def binary(op: Op) -> Call:
    """Two tensors, broadcast."""
    return Call(_BINARY[op.node.op_type], (op.arg(0), op.arg(1)))


@operator("Div")
def div(op: Op) -> Call:
    """Integers are truncated towards zero, also those that are carried in float."""
    if op.is_integer(0):
        return Call(truncated, (op.arg(0), op.arg(1)))
    return Call(torch.div if op.is_float(0) else divide, (op.arg(0), op.arg(1)))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, truncated for integers."""
    return torch.div(a, b) if a.is_floating_point() else truncated(a, b)


def truncated(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` towards zero."""
    return torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def mod(op: Op) -> Call:
    """The sign is the divisor's, or with ``fmod`` the dividend's."""
    return Call(torch.fmod if op.integer("fmod", 0) else torch.remainder, (op.arg(0), op.arg(1)))


@operator("BitwiseNot")
def bitwise_not(op: Op) -> Call:
    """Every bit turned, of an unsigned number as many as its type has."""
    dtype = _known_width(op)
    return Call(torch.bitwise_not if dtype.is_signed() else flipped, (op.arg(0), *_largest(dtype)))


@operator("BitShift")
def bit_shift(op: Op) -> Call:
    """Left or right, by 0 to one less than the width of the type."""
    dtype = _known_width(op)
    if op.text("direction", "LEFT") != "LEFT":
        return Call(torch.bitwise_right_shift, (op.arg(0), op.arg(1)))
    function = torch.bitwise_left_shift if dtype.is_signed() else shifted_left
    return Call(function, (op.arg(0), op.arg(1), *_largest(dtype)))


def _known_width(op: Op) -> ir.DataType:
    dtype = op.type(0)
    if dtype is None or dtype == ir.DataType.UINT64:
        raise op.refuse(f"of {dtype}")
    return dtype


def _largest(dtype: ir.DataType) -> tuple[int, ...]:
    """The largest number of an unsigned type, which is a mask of its bits."""
    return () if dtype.is_signed() else (code_range(dtype)[1],)


def flipped(x: Tensor, mask: int) -> Tensor:
    """``x`` with every bit of ``mask`` turned."""
    return torch.bitwise_xor(x, mask)


def shifted_left(x: Tensor, places: Tensor, mask: int) -> Tensor:
    """``x << places`` without the bits that leave ``mask``."""
    return (torch.bitwise_left_shift(x.to(torch.int64), places.to(torch.int64)) & mask).to(x.dtype)


@operator("IsInf")
def is_inf(op: Op) -> Call:
    """Either sign, or one."""
    positive, negative = op.integer("detect_positive", 1), op.integer("detect_negative", 1)
    return Call(infinite, (op.arg(0), bool(positive), bool(negative)))


def infinite(x: Tensor, positive: bool, negative: bool) -> Tensor:
    """Where ``x`` is an infinity of one of the wanted signs."""
    return (torch.isposinf(x) & positive) | (torch.isneginf(x) & negative)


@operator("Pow")
def power(op: Op) -> Call:
    """The result has the type of the base."""
    exponent = op.const(1)
    if exponent is not None and exponent.size == 1 and exponent.ndim == 0 and op.is_float(0):
        return Call(torch.pow, (op.arg(0), exponent.item()))
    return Call(raised, (op.arg(0), op.arg(1)))


def raised(base: Tensor, exponent: Tensor) -> Tensor:
    """``base ** exponent`` in the type of ``base``."""
    return torch.pow(base, exponent).to(base.dtype)


@operator("Min")
def minimum(op: Op) -> Call:
    """Of any number of tensors."""
    return Call(torch.minimum, op.args()) if len(op.node.inputs) == 2 else Call(smallest, op.args())


def smallest(*tensors: Tensor) -> Tensor:
    """Elementwise minimum."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = torch.minimum(result, tensor)
    return result


@operator("Max")
def maximum(op: Op) -> Call:
    """Of any number of tensors."""
    return Call(torch.maximum, op.args()) if len(op.node.inputs) == 2 else Call(largest, op.args())


def largest(*tensors: Tensor) -> Tensor:
    """Elementwise maximum."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = torch.maximum(result, tensor)
    return result


@operator("Sum")
def total(op: Op) -> Call:
    """Of any number of tensors."""
    return Call(torch.add, op.args()) if len(op.node.inputs) == 2 else Call(added, op.args())


def added(*tensors: Tensor) -> Tensor:
    """Elementwise sum."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = torch.add(result, tensor)
    return result


@operator("Mean")
def mean(op: Op) -> Call:
    """Of any number of tensors."""
    return Call(averaged, op.args())


def averaged(*tensors: Tensor) -> Tensor:
    """Elementwise mean."""
    return added(*tensors) / len(tensors)


@operator("Where")
def where(op: Op) -> Call:
    """``condition ? a : b``."""
    return Call(torch.where, (op.arg(0), op.arg(1), op.arg(2)))
