"""Layers that take codes and give codes or whole sums, by what they mean in float.

Whole sums are computed in float, exact up to 2**24, so that a gradient passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.graph.operators.convolution import Ints, conv_padded, convolution_window
from qopt.graph.operators.quantization import beside, codes_of
from qopt.graph.operators.registry import Call, Op, operator
from qopt.graph.operators.types import CARRIERS, code_range


def centred(codes: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Codes less their zero point, in float; a vector of zero points goes along ``axis``."""
    values = codes.to(torch.float32)
    if zero is None:
        return values
    return values - beside(zero, codes, axis).to(torch.float32)


def _result_range(op: Op, index: int) -> tuple[int, int]:
    dtype = op.type(index)
    if dtype is None or not dtype.is_integer() or dtype not in CARRIERS:
        raise op.refuse(f"to codes of type {dtype}")
    return code_range(dtype)


@operator("ConvInteger")
def conv_integer(op: Op) -> Call:
    """A convolution of codes without scales."""
    return Call(conv_sums, (op.arg(0), op.arg(1), op.optional(2), op.optional(3), *convolution_window(op)))


def conv_sums(
    x: Tensor, weight: Tensor, zero_x: Tensor | None, zero_weight: Tensor | None, stride: Ints, before: Ints,
    after: Ints, dilation: Ints, groups: int,
) -> Tensor:  # fmt: skip
    """Whole sums in float; the padding is the zero point."""
    data, filters = centred(x, zero_x, 0), centred(weight, zero_weight, 0)
    return conv_padded(data, filters, None, stride, before, after, dilation, groups)


@operator("QLinearConv")
def qlinear_conv(op: Op) -> Call:
    """A convolution of codes whose sums become codes again."""
    low, high = _result_range(op, 7)
    inputs = (*(op.arg(index) for index in range(8)), op.optional(8))
    return Call(conv_codes, (*inputs, *convolution_window(op, 3), low, high))


def conv_codes(
    x: Tensor, scale_x: Tensor, zero_x: Tensor, weight: Tensor, scale_weight: Tensor, zero_weight: Tensor,
    scale: Tensor, zero: Tensor, bias: Tensor | None, stride: Ints, before: Ints, after: Ints, dilation: Ints,
    groups: int, low: int, high: int,
) -> Tensor:  # fmt: skip
    """Codes of the output in float; the bias counts in steps of ``scale_x * scale_weight``."""
    sums = conv_sums(x, weight, zero_x, zero_weight, stride, before, after, dilation, groups)
    if bias is not None:
        sums = sums + beside(bias.to(sums.dtype), sums, 1)
    factor = beside(scale_x * scale_weight / scale, sums, 1)
    return codes_of(sums * factor, torch.ones_like(factor), zero.reshape(()), low, high)


@operator("MatMulInteger")
def matmul_integer(op: Op) -> Call:
    """A product of codes without scales."""
    return Call(product_sums, (op.arg(0), op.arg(1), op.optional(2), op.optional(3)))


def product_sums(a: Tensor, b: Tensor, zero_a: Tensor | None, zero_b: Tensor | None) -> Tensor:
    """Whole sums in float; vectors of zero points go with the rows of ``a`` and the columns of ``b``."""
    return torch.matmul(centred(a, zero_a, -2 if a.ndim > 1 else 0), centred(b, zero_b, -1))


@operator("QLinearMatMul")
def qlinear_matmul(op: Op) -> Call:
    """A product of codes whose sums become codes again."""
    low, high = _result_range(op, 7)
    return Call(product_codes, (*(op.arg(index) for index in range(8)), low, high))


def product_codes(
    a: Tensor, scale_a: Tensor, zero_a: Tensor, b: Tensor, scale_b: Tensor, zero_b: Tensor, scale: Tensor,
    zero: Tensor, low: int, high: int,
) -> Tensor:  # fmt: skip
    """Codes of the output in float; vectors of scales go with the rows of ``a`` and the columns of ``b``."""
    sums = product_sums(a, b, zero_a, zero_b)
    rows = beside(scale_a, sums, -2 if sums.ndim > 1 else 0)
    columns = beside(scale_b, sums, -1)
    factor = (rows * columns / beside(scale, sums, -1)).to(sums.dtype)
    return codes_of(sums * factor, torch.ones_like(factor), zero, low, high)
