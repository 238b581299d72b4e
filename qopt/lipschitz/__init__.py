"""Operator norms of weights as intervals that hold, rounding errors included."""

from __future__ import annotations

from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.decide import CandidateNorms, choose, decide
from qopt.lipschitz.layer import LayerNorms, layer_norms, operator_l2, operator_linf
from qopt.lipschitz.lazy import LazyNorm
from qopt.lipschitz.operator import Operator
from qopt.lipschitz.reshaped import as_matrix, max_row_sum, reshaped_l2
from qopt.lipschitz.spectral import spectral_norm, spectral_norms
from qopt.lipschitz.streamed import streamed_norms
from qopt.lipschitz.weighted import moment_root, ratio, weighted_l2

__all__ = [
    "CandidateNorms",
    "LayerNorms",
    "LazyNorm",
    "NormBound",
    "Operator",
    "as_matrix",
    "choose",
    "decide",
    "layer_norms",
    "max_row_sum",
    "moment_root",
    "operator_l2",
    "operator_linf",
    "ratio",
    "reshaped_l2",
    "spectral_norm",
    "spectral_norms",
    "streamed_norms",
    "weighted_l2",
]
