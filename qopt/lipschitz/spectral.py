"""Spectral norms with both ends sound: Gram matrix and symmetric eigenvalues in float64, rounding accounted for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz.bound import NormBound

METHOD = "gram+eigvalsh"

EPS = torch.finfo(torch.float64).eps


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
    exponents = torch.frexp(wide.abs().amax(dim=(1, 2))).exponent
    scaled = _times_power_of_two(wide, -exponents[:, None, None])
    eigenvalues = torch.linalg.eigvalsh(scaled @ scaled.mT)[:, -1]
    slack = _rounding(scaled)
    return [
        bound_of_eigenvalue(eigenvalue, eigenvalue, error, int(exponent), METHOD)
        for eigenvalue, error, exponent in zip(eigenvalues.tolist(), slack.tolist(), exponents.tolist(), strict=True)
    ]


def finite(tensor: Tensor, where: str) -> Tensor:
    """``tensor`` in float64 on the CPU; raises CorruptModelError for entries that are not finite float32 numbers."""
    if not bool(torch.isfinite(tensor.to(torch.float32)).all()):
        raise CorruptModelError("entries that are not finite float32 numbers", where=where)
    return tensor.detach().to("cpu", torch.float64)


def _times_power_of_two(wide: Tensor, exponents: Tensor) -> Tensor:
    """Exact, so that squares neither overflow nor vanish; in two steps, because 2**1074 is no float64."""
    half = exponents.div(2, rounding_mode="floor")
    return wide * torch.exp2(half.to(torch.float64)) * torch.exp2((exponents - half).to(torch.float64))


def _rounding(scaled: Tensor) -> Tensor:
    """How far the computed top eigenvalue of A A^T may be off: ``4 (m + n) eps ||A||_F^2``, per matrix.

    The product is off by at most ``n eps/2 / (1 - n eps/2) ||A||_F^2`` in norm (Higham 2002, equation 3.13), the
    eigenvalues by a small multiple of ``m eps ||A A^T||`` (backward stability and Weyl), and the sum of squares by
    itself by a part of ``m n eps``; the factor 4 covers all of it.
    """
    return 4 * (scaled.shape[1] + scaled.shape[2]) * EPS * scaled.square().sum(dim=(1, 2))


def bound_of_eigenvalue(low: float, high: float, error: float, exponent: int, method: str) -> NormBound:
    """The norm whose square over ``4 ** exponent`` lies in [low - error, high + error].

    4 eps cover the roots and sums, one step a result below 1e-307. Without an error the matrix is zero.
    """
    if not error:
        return NormBound(0.0, 0.0, method)
    upper = math.ldexp(math.sqrt(high + error) * (1 + 4 * EPS), exponent)
    lower = math.ldexp(math.sqrt(max(low - error, 0.0)) * (1 - 4 * EPS), exponent)
    return NormBound(math.nextafter(lower, 0.0), math.nextafter(upper, math.inf), method)
