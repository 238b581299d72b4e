"""The facts of every layer that search chooses by: norms of W, W_q and dW for each candidate format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qopt.cache import Cache, digest_arrays
from qopt.graph.model import Layer
from qopt.lipschitz import (
    NormBound,
    as_matrix,
    max_row_sum,
    moment_root,
    ratio,
    reshaped_l2,
    streamed_norms,
    weighted_l2,
)
from qopt.quantize import WeightOnly
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec

LARGE = 1 << 20
"""Weights of a layer whose norms are computed a part at a time."""


def layer_norms(quantizer: WeightOnly, layer: Layer, cache: Cache) -> tuple[NormBound, NormBound]:
    """``||W||_2`` and ``||W||_inf`` of the reshaped float weight."""
    weight = quantizer.weight(layer)
    l2, rows = _bounds(cache, layer, weight, "float", lambda: _pair(layer, weight))
    return l2, rows


def candidate_norms(
    quantizer: WeightOnly, layer: Layer, spec: WeightSpec, cache: Cache
) -> tuple[NormBound, NormBound, NormBound]:
    """``||W_q||_2``, ``||W - W_q||_2`` and ``||W - W_q||_inf`` of the reshaped weight in one format.

    Of a large layer the first is bounded by the triangle inequality, half the work, where that tells no less of the
    paper's thresholds than the norm itself would.
    """
    weight = quantizer.weight(layer)

    def compute() -> Sequence[NormBound]:
        quantized = quantizer.quantized_weight(layer, spec).dequantize()
        if not _is_large(layer):
            return code_norms(layer, weight, quantized)
        error, rows = _pair(layer, weight, quantized)
        whole = layer_norms(quantizer, layer, cache)[0]
        norm = _between(whole, error)
        bound_q, bound_d = paper_thresholds(whole.upper)
        if norm.upper > bound_q * max(1.0, error.upper / bound_d):
            norm = _pair(layer, quantized)[0]
        return norm, error, rows

    norm, error, rows = _bounds(cache, layer, weight, str(spec), compute)
    return norm, error, rows


def code_norms(layer: Layer, weight: Tensor, quantized: Tensor) -> tuple[NormBound, NormBound, NormBound]:
    """``||W_q||_2``, ``||W - W_q||_2`` and ``||W - W_q||_inf`` of codes however they were rounded."""
    error, rows = _pair(layer, weight, quantized)
    return _pair(layer, quantized)[0], error, rows


def weighted_errors(
    quantizer: WeightOnly, layer: Layer, formats: Sequence[WeightSpec], moment: Tensor
) -> list[NormBound]:
    """``||dW C^(1/2)||_2 / ||W C^(1/2)||_2`` in each format; C is ``moment``, (groups, columns, columns)."""
    weight, root = quantizer.weight(layer).double(), moment_root(moment)

    def norm(matrix: Tensor) -> NormBound:
        return weighted_l2(matrix, root, layer.channel_axis, layer.groups, where=layer.name)

    whole = norm(weight)
    return [ratio(norm(weight - quantizer.quantized_weight(layer, s).dequantize().double()), whole) for s in formats]


def _is_large(layer: Layer) -> bool:
    return layer.groups == 1 and layer.weights >= LARGE


def _between(norm: NormBound, error: NormBound) -> NormBound:
    """What ``||W + E||`` can be for these norms of W and E; an ulp each way is more than the sums are off by."""
    lower = max(norm.lower - error.upper, error.lower - norm.upper, 0.0)
    upper = math.nextafter(norm.upper + error.upper, math.inf)
    return NormBound(max(math.nextafter(lower, -math.inf), 0.0), upper, f"{norm.method}+triangle")


def _pair(layer: Layer, weight: Tensor, other: Tensor | None = None) -> tuple[NormBound, NormBound]:
    """The spectral norm and the largest row sum of ``weight - other``."""
    axis, groups, name = layer.channel_axis, layer.groups, layer.name
    if _is_large(layer):
        matrix = None if other is None else as_matrix(other, axis, where=name)[0]
        return streamed_norms(as_matrix(weight, axis, where=name)[0], matrix, where=name)
    if other is not None:
        weight = weight.double() - other.double()
    return reshaped_l2(weight, axis, groups, where=name), max_row_sum(weight, axis, groups, where=name)


def _bounds(
    cache: Cache, layer: Layer, weight: Tensor, what: str, compute: Callable[[], Sequence[NormBound]]
) -> list[NormBound]:
    """What ``compute`` returns, kept by the weight's content."""
    key = {
        "weight": digest_arrays(weight.numpy()), "axis": layer.channel_axis, "groups": layer.groups, "format": what
    }  # fmt: skip
    return kept_bounds(cache, "norms", key, compute)


def kept_bounds(
    cache: Cache, kind: str, key: Mapping[str, Any], compute: Callable[[], Sequence[NormBound]]
) -> list[NormBound]:
    """The bounds that ``compute`` returns, in their order; computed once for one ``kind`` and ``key``."""

    def arrays() -> dict[str, NDArray[np.float64]]:
        bounds = compute()
        return {f"{i}:{bound.method}": np.array([bound.lower, bound.upper]) for i, bound in enumerate(bounds)}

    stored = cache.arrays(kind, key, arrays)
    return [NormBound(float(v[0]), float(v[1]), name.split(":", 1)[1]) for name, v in sorted(stored.items())]
