"""Matrices: products by a formula, triangles, the identity, the determinant."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator
from qopt.graph.operators.types import CARRIERS


@operator("Einsum")
def einsum(op: Op) -> Call:
    """Products and sums by Einstein's convention."""
    return Call(torch.einsum, (op.text("equation", "").replace(" ", ""), *op.args()))


@operator("Trilu")
def trilu(op: Op) -> Call:
    """The upper or the lower triangle, from diagonal ``k`` on."""
    diagonal = op.number_at(1)
    return Call(triangle, (op.arg(0), 0 if diagonal is None else diagonal, bool(op.integer("upper", 1))))


def triangle(x: Tensor, diagonal: Tensor | int, upper: bool) -> Tensor:
    """``x`` with everything below, or above, a diagonal set to zero."""
    return (torch.triu if upper else torch.tril)(x, int(diagonal))


@operator("EyeLike")
def eye_like(op: Op) -> Call:
    """Ones on diagonal ``k`` of a matrix of the input's shape."""
    dtype = ir.DataType(op.integer("dtype", op.type(0) or ir.DataType.FLOAT))
    if dtype not in CARRIERS:
        raise op.refuse(f"of {dtype}")
    return Call(eye, (op.arg(0), op.integer("k", 0), CARRIERS[dtype]))


def eye(x: Tensor, diagonal: int, dtype: torch.dtype) -> Tensor:
    """Ones on a diagonal, zeros elsewhere, in the shape of ``x``."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return (columns[None, :] - rows[:, None] == diagonal).to(dtype)


@operator("Det")
def determinant(op: Op) -> Call:
    """Of the last two axes."""
    return Call(torch.linalg.det, (op.arg(0),))
