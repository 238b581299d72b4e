"""Elementwise arithmetic, comparisons, logic and casts; also matrix products of two computed tensors."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

_UNARY: Final[dict[str, Any]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
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
    "Sqrt": torch.sqrt,
}

_BINARY: Final[dict[str, Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
}

_DTYPES: Final = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
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
    """Integers are truncated towards zero."""
    return Call(torch.div if op.is_float(0) else divide, (op.arg(0), op.arg(1)))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, truncated for integers."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


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


@operator("Where")
def where(op: Op) -> Call:
    """``condition ? a : b``."""
    return Call(torch.where, (op.arg(0), op.arg(1), op.arg(2)))


@operator("Cast")
def cast(op: Op) -> Call:
    """To any type that torch computes with."""
    wanted = ir.DataType(op.integer("to", ir.DataType.FLOAT))
    if wanted not in _DTYPES:
        raise op.refuse(f"to {wanted}")
    return Call(to_dtype, (op.arg(0), _DTYPES[wanted]))


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another type."""
    return x.to(dtype)
