"""Spectral norms with both ends sound: Gram matrix and symmetric eigenvalues in float64, rounding accounted for."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cache

import torch
from scipy.linalg import eigvalsh
from threadpoolctl import ThreadpoolController
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz.bound import NormBound

METHOD = "gram+eigvalsh"

EPS = torch.finfo(torch.float64).eps

WIDE = 200
"""Exponents of two of largest entries up to which squares neither overflow nor vanish, and nothing is scaled."""

SMALL = 128
"""Sides of Gram matrices from which on it pays to compute one eigenvalue instead of all."""


def spectral_norm(matrix: Tensor, *, where: str = "matrix") -> NormBound:
    """The largest singular value of ``matrix``, shape (m, n), any real dtype.

    Relative width of the interval: at most ``12 eps (m + n) min(m, n)`` with float64's eps; 3e-9 for 512 x 4608.

    Raises:
        CorruptModelError: for NaN or infinite entries.
        UsageError: for anything but a matrix with entries.
    """
    if matrix.ndim != 2:
        raise UsageError("not a matrix", where=where, expected="two axes", got=f"shape {tuple(matrix.shape)}")
    return spectral_norms(matrix[None], where=where)[0]


def spectral_norms(matrices: Tensor, *, where: str = "matrices") -> list[NormBound]:
    """`spectral_norm` of each of (batch, m, n), in one batched eigenvalue call; the same errors."""
    if matrices.ndim != 3 or matrices.numel() == 0:
        raise UsageError(
            "not a batch of matrices", where=where, expected="(batch, m, n)", got=str(tuple(matrices.shape))
        )
    wide = finite(matrices, where)
    wide = wide if wide.shape[1] <= wide.shape[2] else wide.mT
    least, most = wide.amin(dim=(1, 2)), wide.amax(dim=(1, 2))
    exponents = torch.frexp(torch.maximum(-least, most)).exponent
    if int(exponents.abs().max()) > WIDE:
        wide = times_power_of_two(wide, -exponents[:, None, None])
    else:
        exponents = torch.zeros_like(exponents)
    grams = _grams(wide)
    slack = _rounding(grams, wide.shape[2])
    return [
        bound_of_eigenvalue(eigenvalue, eigenvalue, error, int(exponent), METHOD)
        for eigenvalue, error, exponent in zip(top_eigenvalues(grams), slack.tolist(), exponents.tolist(), strict=True)
    ]


def _grams(wide: Tensor) -> Tensor:
    """``A A^T`` of each matrix: numpy sees that it is symmetric and does half the work."""
    if len(wide) > 1:
        return wide @ wide.mT
    matrix = wide[0].numpy()
    with _one_thread():
        return torch.from_numpy(matrix @ matrix.T)[None]


def top_eigenvalues(grams: Tensor) -> list[float]:
    """The largest eigenvalue of each symmetric matrix."""
    side = grams.shape[1]
    if len(grams) > 1 or side < SMALL:
        return [float(value) for value in torch.linalg.eigvalsh(grams)[:, -1]]
    last = [side - 1, side - 1]
    with _one_thread():
        return [float(eigvalsh(grams[0].numpy(), subset_by_index=last, check_finite=False)[0])]


def _one_thread() -> AbstractContextManager[object]:
    """For numpy and scipy, each of which has threads of its own beside torch's: idle ones spin, and where cores are
    fewer than all of them together, every one waits for its turn, up to 40 times as long."""
    limited: AbstractContextManager[object] = _pools().limit(limits=1, user_api="blas")
    return limited


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def finite(tensor: Tensor, where: str) -> Tensor:
    """``tensor`` in float64 on the CPU; raises CorruptModelError for entries that are not finite float32 numbers."""
    ends = torch.stack(torch.aminmax(tensor.detach())) if tensor.numel() else tensor
    if not bool(torch.isfinite(ends.to(torch.float32)).all()):
        raise CorruptModelError("entries that are not finite float32 numbers", where=where)
    return tensor.detach().to("cpu", torch.float64)


def times_power_of_two(wide: Tensor, exponents: Tensor) -> Tensor:
    """Exact, so that squares neither overflow nor vanish; in two steps, because 2**1074 is no float64."""
    half = exponents.div(2, rounding_mode="floor")
    return wide * torch.exp2(half.to(torch.float64)) * torch.exp2((exponents - half).to(torch.float64))


def _rounding(grams: Tensor, columns: int) -> Tensor:
    """How far the computed top eigenvalue of A A^T may be off: ``4 (m + n) eps ||A||_F^2``, per matrix.

    The product is off by at most ``n eps/2 / (1 - n eps/2) ||A||_F^2`` in norm (Higham 2002, equation 3.13), the
    eigenvalues by a small multiple of ``m eps ||A A^T||`` (backward stability and Weyl), and the sum of squares, the
    trace, by itself by a part of ``(m + n) eps``; the factor 4 covers all of it.
    """
    return 4 * (grams.shape[1] + columns) * EPS * grams.diagonal(dim1=1, dim2=2).sum(dim=1)


def bound_of_eigenvalue(low: float, high: float, error: float, exponent: int, method: str) -> NormBound:
    """The norm whose square over ``4 ** exponent`` lies in [low - error, high + error].

    4 eps cover the roots and sums, one step a result below 1e-307. Without an error the matrix is zero.
    """
    if not error:
        return NormBound(0.0, 0.0, method)
    upper = math.ldexp(math.sqrt(high + error) * (1 + 4 * EPS), exponent)
    lower = math.ldexp(math.sqrt(max(low - error, 0.0)) * (1 - 4 * EPS), exponent)
    return NormBound(math.nextafter(lower, 0.0), math.nextafter(upper, math.inf), method)
