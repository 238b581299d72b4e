"""The one operator outside the standard that files of qopt hold: a product with a matrix that stays packed."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator


@operator("com.microsoft::MatMulNBits")
def matmul_nbits(op: Op) -> Call:
    """``A @ W.T + bias``, W (N, K) in codes of 2, 4 or 8 bits with a scale for every block of a row.

    ``accuracy_level`` 4, and its absence, let ONNX Runtime round activations to 8 bits, which the twin does not do.
    """
    bits = op.integer("bits", 4)
    if bits not in (2, 4, 8):
        raise op.refuse(f"of {bits} bits")
    if op.given(4):
        raise op.refuse("with an order of groups")
    if op.integer("accuracy_level", 0) not in (1, 2):
        raise op.refuse("without accuracy_level 1, where activations may be quantized unasked,")
    sizes = (op.integer("N", 0), op.integer("K", 0), bits, op.integer("block_size", 0))
    return Call(packed_product, (op.arg(0), op.arg(1), op.arg(2), op.optional(3), op.optional(5), *sizes))


def packed_product(
    a: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, n: int, k: int, bits: int,
    block: int,
) -> Tensor:  # fmt: skip
    """The product of ``a`` (..., k) with the unpacked matrix, (..., n); gradients flow to ``a``."""
    product = a @ unpacked(codes, scales, zeros, n, k, bits, block).to(a.dtype).T
    return product if bias is None else product + bias


def unpacked(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, block: int
) -> Tensor:  # fmt: skip
    """The matrix (n, k): ``(code - zero) * scale``; zero is the middle of the codes where no zero points are given.

    ``codes`` are uint8 (n, blocks, block * bits / 8), the first of a byte lowest; packed zero points begin a byte for
    every row; zero points in float come one by one.
    """
    blocks = -(-k // block)
    values = _fields(codes.reshape(n, -1), bits)[:, : blocks * block].reshape(n, blocks, block)
    if zeros is None:
        middle = torch.full((n, blocks), 1 << (bits - 1), dtype=scales.dtype, device=scales.device)
    elif zeros.is_floating_point():
        middle = zeros.reshape(n, blocks)
    else:
        middle = _fields(zeros.reshape(n, -1), bits)[:, :blocks].to(scales.dtype)
    weights = (values.to(scales.dtype) - middle[:, :, None]) * scales.reshape(n, blocks, 1)
    return weights.reshape(n, -1)[:, :k]


def _fields(rows: Tensor, bits: int) -> Tensor:
    """Bytes (n, m) taken apart: (n, m * 8 / bits)."""
    shifts = torch.arange(0, 8, bits, device=rows.device, dtype=torch.int32)
    return ((rows.to(torch.int32)[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(rows), -1)
