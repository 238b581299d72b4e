"""Norms of large weights and of their errors, a part at a time: no copy of the weight in float64 is ever held.

The bounds are those of `spectral` and `reshaped`, the rounding of sums in parts included: the bound of Higham (2002,
equation 3.13) holds for any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.spectral import EPS, METHOD, bound_of_eigenvalue, finite

PART = 1 << 18
"""Entries in a part: 2 MB in float64."""

WIDEST_DENSE = 1024
"""Rows of a Gram matrix whose eigenvalues are all computed; of a larger one only the largest is enclosed."""

LEAST_EXPONENT = 1000
"""Of two, below which nothing is scaled up: the factor must be a float64 number too."""

ITERATIONS = 60
"""Steps of the power method, which the certificate starts from."""

WIDTHS = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
"""By what part the certified eigenvalue may exceed the found one; the first that can be certified is taken."""


def streamed_norms(
    weight: Tensor, other: Tensor | None = None, *, where: str = "weight"
) -> tuple[NormBound, NormBound]:
    """``||W - V||_2`` and ``||W - V||_inf`` of matrices (rows, columns); V of zeros where there is none.

    Raises:
        CorruptModelError: for NaN or infinite entries.
        UsageError: for anything but two matrices of one shape, with entries.
    """
    if weight.ndim != 2 or not weight.numel() or (other is not None and other.shape != weight.shape):
        got = f"{tuple(weight.shape)}" + ("" if other is None else f" and {tuple(other.shape)}")
        raise UsageError("no two matrices of one shape", where=where, got=got)
    sums, largest = torch.zeros(weight.shape[0], dtype=torch.float64), 0.0
    for first, last, part in _parts(weight, other, where, rows=True):
        part.abs_()
        sums[first:last] = part.sum(dim=1)
        largest = max(largest, float(part.max()))
    slack = weight.shape[1] * EPS
    norm = float(sums.max())
    row_sum = NormBound(norm * (1 - slack), norm * (1 + slack), "row-sum")
    return _spectral(weight, other, largest, where), row_sum


def _spectral(weight: Tensor, other: Tensor | None, largest: float, where: str) -> NormBound:
    rows, columns = weight.shape
    side = min(rows, columns)
    exponent = max(math.frexp(largest)[1], -LEAST_EXPONENT)
    gram, squares = torch.zeros(side, side, dtype=torch.float64), 0.0
    for _, _, part in _parts(weight, other, where, rows=rows > columns):
        tall = part if rows > columns else part.mT
        tall = tall.mul_(2.0**-exponent)  # exact: squares neither overflow nor vanish
        gram.addmm_(tall.mT, tall)
        squares += float(tall.square().sum())
    slack = 4 * (rows + columns) * EPS * squares
    if side <= WIDEST_DENSE:
        value = float(torch.linalg.eigvalsh(gram)[-1])
        return bound_of_eigenvalue(value, value, slack, exponent, METHOD)
    low, high = _enclosed(gram)
    return bound_of_eigenvalue(low, high, slack, exponent, "gram+cholesky")


def _parts(weight: Tensor, other: Tensor | None, where: str, *, rows: bool) -> Iterator[tuple[int, int, Tensor]]:
    """First and last row or column, and the difference of the two matrices there in float64, which the caller owns."""
    axis = 0 if rows else 1
    step = max(1, PART // weight.shape[1 - axis])
    for first in range(0, weight.shape[axis], step):
        last = min(first + step, weight.shape[axis])
        part = finite(weight.narrow(axis, first, last - first), where)
        if other is None:
            yield first, last, part.clone() if weight.dtype == torch.float64 else part
        else:
            yield first, last, part - finite(other.narrow(axis, first, last - first), where)


def _enclosed(gram: Tensor) -> tuple[float, float]:
    """An interval around the largest eigenvalue of a positive semidefinite matrix, as it is in float64.

    A Rayleigh quotient is never above it. Where Cholesky's algorithm succeeds on ``mu I - G``, that matrix is positive
    semidefinite up to ``(n + 2) eps`` of its trace (Rump 2006, "Verification of positive definiteness").
    """
    side = len(gram)
    vector = gram[:, int(gram.diagonal().argmax())].clone()
    for _ in range(ITERATIONS):
        length = float(vector.norm())
        if not length:
            break
        vector = gram @ (vector / length)
    square = float(vector @ vector)
    found = float(vector @ (gram @ vector)) / square if square else 0.0
    low = max(found * (1 - 4 * side * EPS), 0.0)
    for width in WIDTHS:
        high = max(found, float(gram.diagonal().max())) * (1 + width)
        shifted = -gram
        shifted.diagonal().add_(high)
        trace = float(shifted.diagonal().sum())
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return low, high + (side + 2) * EPS * trace
    high = float(torch.linalg.eigvalsh(gram)[-1])
    return low, max(low, high)
