"""Upper bounds of the norm of an affine map, in l2 and linf; never too small, rounding included."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from qopt.certificates.maps import Average, Convolution, Map, Pick, Product, Scaling, Shape
from qopt.lipschitz import NormBound, max_row_sum, spectral_norm
from qopt.lipschitz.layer import operator_l2, operator_linf
from qopt.lipschitz.operator import Operator
from qopt.threat import Norm

OUTWARD: Final = 1 + 2.0**-36
"""Covers the float64 rounding of a sum of up to 2**14 terms of one sign, or of a few operations."""


def operator_norm(map_: Map, source: Shape, norm: Norm) -> float:
    """``sup ||W x|| / ||x||`` over inputs of shape ``source``, from above; the offset does not count."""
    return map_norm(map_, source, norm).upper


def map_norm(map_: Map, source: Shape, norm: Norm, *, where: str = "weight") -> NormBound:
    """The same with a lower bound, which is 0 where only sums of rows and columns are known.

    Raises:
        CorruptModelError: NaN or infinite weights of a convolution or a product, in the layer ``where``.
    """
    if isinstance(map_, Scaling):
        size = 1.0 if map_.factor is None else float(map_.factor.abs().max())
        return NormBound(size, size, "largest factor")
    if isinstance(map_, Product):
        return (max_row_sum if norm == "linf" else spectral_norm)(map_.weight, where=where)
    if isinstance(map_, Convolution) and len(map_.stride) <= 2:
        pads = tuple((pad, pad) for pad in map_.padding)
        operator = Operator(
            "convolution", groups=map_.groups, stride=map_.stride, dilation=map_.dilation, padding=pads,
            size=source[1:],
        )  # fmt: skip
        return (operator_linf if norm == "linf" else operator_l2)(map_.weight, operator, where=where)
    sums = largest_sums(map_, source)[0] if norm == "linf" else schur(map_, source)
    return NormBound(0.0, sums, "row and column sums")


def schur(map_: Map, source: Shape) -> float:
    """``sqrt(||W||_1 ||W||_inf)``, never below the l2 norm of W, nor of W with the sizes of its entries."""
    rows, columns = largest_sums(map_, source)
    return math.sqrt(rows) * math.sqrt(columns) * OUTWARD


def largest_sums(map_: Map, source: Shape) -> tuple[float, float]:
    """The largest sum of sizes of a row and of a column of W, from above."""
    if isinstance(map_, Pick):
        return 1.0, float(map_.back_terms + 1)
    sizes = map_.magnitude()
    ones = torch.ones(1, *source, dtype=torch.float64)
    rows = sizes.product(ones)
    columns = sizes.adjoint(torch.ones_like(rows))
    grow = 1 + 4 * (map_.terms + map_.back_terms + 8) * 2.0**-53
    return float(rows.max()) * grow, float(columns.max()) * grow


def length(values: Tensor, norm: Norm) -> float:
    """The norm of one vector, from above."""
    if not values.numel():
        return 0.0
    wide = values.double().flatten()
    return float(wide.abs().max()) if norm == "linf" else float(torch.linalg.vector_norm(wide)) * OUTWARD


def weight_change(first: Map, second: Map) -> Map | None:
    """The map ``first - second`` without offsets; None where the two share W.

    Raises:
        ValueError: they are not two maps of one kind and geometry.
    """
    if type(first) is not type(second):
        raise ValueError("two kinds of map")
    if isinstance(first, (Average, Pick)):
        return None
    assert isinstance(first, (Convolution, Product, Scaling))
    weights = [m.factor if isinstance(m, Scaling) else m.weight for m in (first, second)]  # type: ignore[attr-defined]
    if weights[0] is None and weights[1] is None:
        return None
    mine, other = (torch.ones((), dtype=torch.float64) if w is None else w for w in weights)
    if mine.shape != other.shape:
        raise ValueError(f"weights of shapes {tuple(mine.shape)} and {tuple(other.shape)}")
    change = mine - other
    return None if not bool(change.any()) else first.with_weight(change)
