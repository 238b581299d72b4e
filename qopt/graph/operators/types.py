"""Element types: what torch carries each ONNX type in, and casts.

Integers that torch does not compute with are carried in the next wider type that it does: 2- and 4-bit ones in 8 bits,
unsigned ones of 16, 32 and 64 bits in int32, int64 and int64. Codes that QuantizeLinear computes are carried in float,
so that gradients pass (`qopt.graph.operators.quantization`).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator

CARRIERS: Final = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT2: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.UINT32: torch.int64,
    ir.DataType.UINT64: torch.int64,
}
"""The torch type that holds the values of each ONNX type that the twin takes."""

_BITS: Final = {
    ir.DataType.INT2: 2,
    ir.DataType.INT4: 4,
    ir.DataType.UINT2: 2,
    ir.DataType.UINT4: 4,
    ir.DataType.UINT16: 16,
    ir.DataType.UINT32: 32,
}
"""The width of the integers that are narrower than what carries them."""


def code_range(dtype: ir.DataType) -> tuple[int, int]:
    """The smallest and the largest number of an integer type."""
    bits = int(dtype.itemsize * 8)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


def carried(array: NDArray[Any], dtype: ir.DataType) -> Tensor:
    """A copy of ``array``, of the ONNX type ``dtype``, as the twin holds it; raises TypeError where it cannot."""
    if dtype not in CARRIERS:
        raise TypeError(f"torch does not compute with {dtype}")
    if dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    wanted = torch.empty(0, dtype=CARRIERS[dtype]).numpy().dtype
    return torch.from_numpy(np.array(array.astype(wanted), copy=True, order="C"))


@operator("Cast")
def cast(op: Op) -> Call:
    """To any type that torch computes with."""
    return _cast(op, ir.DataType(op.integer("to", ir.DataType.FLOAT)))


@operator("CastLike")
def cast_like(op: Op) -> Call:
    """To the type of the second input."""
    wanted = op.type(1)
    if wanted is None:
        raise op.refuse("to an unknown type")
    return _cast(op, wanted)


def _cast(op: Op, wanted: ir.DataType) -> Call:
    if wanted not in CARRIERS:
        raise op.refuse(f"to {wanted}")
    if op.type(0) is not None and op.type(0) not in CARRIERS:
        raise op.refuse(f"of {op.type(0)}")
    if wanted in _BITS and op.type(0) != wanted:
        return Call(to_narrow, (op.arg(0), CARRIERS[wanted], *code_range(wanted)))
    return Call(to_dtype, (op.arg(0), CARRIERS[wanted]))


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another type."""
    return x.to(dtype)


def to_narrow(x: Tensor, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """``x`` as integers of a width that ``dtype`` only carries: what does not fit in ``low..high`` wraps round."""
    return (torch.remainder(x.to(torch.int64) - low, high - low + 1) + low).to(dtype)
