"""Operator norms of weights as intervals that hold, rounding errors included."""

from __future__ import annotations

from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.reshaped import as_matrix, max_row_sum, reshaped_l2
from qopt.lipschitz.spectral import spectral_norm, spectral_norms
from qopt.lipschitz.streamed import streamed_norms
from qopt.lipschitz.weighted import moment_root, ratio, weighted_l2

__all__ = [
    "NormBound",
    "as_matrix",
    "max_row_sum",
    "moment_root",
    "ratio",
    "reshaped_l2",
    "spectral_norm",
    "spectral_norms",
    "streamed_norms",
    "weighted_l2",
]
