"""From what was observed of a tensor to the range that its codes cover.

Every calibrator reads the observer's histogram, so that the values themselves need not be kept. All bounds lie within
the observed minimum and maximum (the fixed clips aside): what a ReLU6 has clipped is never given codes beyond 6.
"""

from __future__ import annotations

from itertools import product
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.quant.observer import HALF, RangeObserver
from qopt.spec import ActivationSpec

Bounds = tuple[float, float]
Floats = NDArray[np.float64]

OCTAVES: Final = 12
"""The mean-square search shrinks either bound by at most 2**12: below that, the histogram tells nothing apart."""

STEPS: Final = (1 / 4, 1 / 16, 1 / 64)
"""Octaves between candidate bounds: a grid over all of them, then finer ones around the best."""

ENTROPY_BINS: Final = 2048
"""Bins on either side of zero for the entropy calibrator, as TensorRT has them."""

ENTROPY_START: Final = 128
"""Bins that the narrowest candidate of the entropy calibrator keeps, as NVIDIA's and ONNX Runtime's do."""

CLIPS: Final = {"clip1": 1.0, "clip6": 6.0}


def calibrated_bounds(observer: RangeObserver, spec: ActivationSpec) -> Bounds:
    """The ``(low, high)`` that the codes of ``spec`` shall cover; `AffineRange.from_bounds` makes the codes of them.

    Raises:
        UsageError: nothing was observed.
    """
    if spec.calibrator == "percentile":
        return observer.bounds(spec.percentile)
    low, high = observer.bounds()
    if spec.calibrator in CLIPS:
        return (0.0, CLIPS[spec.calibrator]) if low >= 0 else (low, high)
    if low == high:
        return low, high
    return mean_square_bounds(observer, spec.bits) if spec.calibrator == "mse" else entropy_bounds(observer, spec.bits)


def mean_square_bounds(observer: RangeObserver, bits: int) -> Bounds:
    """The bounds of least squared error under the histogram, over a grid of shrunken minima and maxima.

    A histogram knows the root of the mean squared error to half a bin's width. Min-max stays where no candidate is
    better by more than a bin, so that the error on the values themselves is never above that of min-max.
    """
    error = SquaredError(observer)
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    centre = (0.0, 0.0)
    reach = 2.0 * OCTAVES  # the first grid covers everything
    for step in STEPS:
        axes = [_exponents(at, reach, step) if bound else (0.0,) for at, bound in zip(centre, (low, high), strict=True)]
        pairs = np.array(list(product(*axes)))
        errors = error(low * 2.0 ** pairs[:, 0], high * 2.0 ** pairs[:, 1], bits)
        centre = (float(pairs[errors.argmin(), 0]), float(pairs[errors.argmin(), 1]))
        reach = step
    found = low * 2.0 ** centre[0], high * 2.0 ** centre[1]
    candidate, widest = np.sqrt(error(np.array([found[0], low]), np.array([found[1], high]), bits))
    return found if candidate + observer.bin_width < widest else observer.bounds()


def _exponents(at: float, reach: float, step: float) -> tuple[float, ...]:
    """Multiples of ``step`` in [-OCTAVES, 0] that are at most ``reach`` from ``at``, the widest first."""
    return tuple(-k * step for k in range(int(OCTAVES / step) + 1) if abs(-k * step - at) <= reach)


@final
class SquaredError:
    """Mean squared error of affine codes on what an observer has seen, every value taken for the middle of its bin.

    Sums over the bins between two levels come from prefix sums, so a candidate costs as many steps as it has codes.
    """

    def __init__(self, observer: RangeObserver) -> None:
        self.unit = observer.bin_width
        counts = observer.counts.numpy()
        bins = np.flatnonzero(counts)
        self.values = np.clip(bins - HALF + 0.5, observer.low / self.unit, observer.high / self.unit)  # units of bins
        weights = counts[bins].astype(np.float64)
        self.sums = [np.concatenate([[0.0], np.cumsum(weights * self.values**power)]) for power in range(3)]

    def __call__(self, lows: Floats, highs: Floats, bits: int) -> Floats:
        """Mean squared errors (n,) of the codes that `AffineRange.from_bounds` makes of ``lows`` and ``highs`` (n,)."""
        codes = 2**bits - 1
        lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
        limits = np.finfo(np.float32)
        scales = np.maximum(((highs - lows) / codes).astype(np.float32), limits.tiny).astype(np.float64)
        zero_points = np.minimum(np.rint(-lows / scales), codes)
        levels = (np.arange(codes + 1) - zero_points[:, None]) * (scales / self.unit)[:, None]
        inner = np.searchsorted(self.values, (levels[:, 1:] + levels[:, :-1]) / 2)
        ends = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(self.values))))
        count, first, second = (np.diff(sums[ends], axis=1) for sums in self.sums)
        total = (second - 2 * levels * first + levels**2 * count).sum(1)
        mean: Floats = np.maximum(total / self.sums[0][-1], 0.0) * self.unit**2
        return mean


def entropy_bounds(observer: RangeObserver, bits: int) -> Bounds:
    """The bounds that lose least information, in Kullback-Leibler divergence from the clipped histogram.

    Migacz, "8-bit Inference with TensorRT" (GTC 2017), over 2**bits levels, with the bins spread over the levels as
    NVIDIA's pytorch-quantization spreads them, and the bin of zero, which rectified values fill, replaced by its
    neighbour as there. Values on both sides of zero are clipped alike on both, as ONNX Runtime does. Where fewer bins
    hold values than there are levels, nothing is lost or known: such bounds are no candidates, and min-max stays where
    there are no others.

    Published for 8 bits and smooth distributions: with fewer levels it may clip most of what a spiky one has.
    """
    bins = observer.counts.numpy().reshape(2 * ENTROPY_BINS, -1).sum(1).astype(np.float64)
    low, high = observer.bounds()
    if low >= 0:
        sides = bins[ENTROPY_BINS:]
    elif high <= 0:
        sides = bins[:ENTROPY_BINS][::-1].copy()
    else:
        sides = bins
    sides[ENTROPY_BINS if low < 0 < high else 0] = sides[ENTROPY_BINS + 1 if low < 0 < high else 1]
    kept = _least_divergence(sides, 2**bits, both=low < 0 < high)
    if kept is None:
        return low, high
    bound = kept * observer.bin_width * (HALF // ENTROPY_BINS)
    return (max(low, -bound) if low < 0 else low), (min(high, bound) if high > 0 else high)


def _least_divergence(bins: Floats, levels: int, *, both: bool) -> int | None:
    """How many bins to keep on each side of zero; ``bins`` (ENTROPY_BINS,) start at zero, or twice as many around it.

    None where no number of them keeps as many filled ones as there are levels.
    """
    zero = len(bins) // 2 if both else 0
    used = np.flatnonzero(bins)
    widest = max(zero - int(used[0]), int(used[-1]) + 1 - zero)
    filled = np.concatenate([[0], np.cumsum(bins > 0)])
    divergences = {}
    for kept in range(ENTROPY_START // 2 if both else ENTROPY_START, widest + 1):
        start, stop = max(zero - kept, 0), zero + kept
        if filled[stop] - filled[start] >= levels:
            divergences[kept] = _divergence(bins, start, stop, levels)
    return min(divergences, key=lambda kept: divergences[kept], default=None)


def _divergence(bins: Floats, start: int, stop: int, levels: int) -> float:
    """KL divergence in nats of the bins in [start, stop), what is outside moved to the ends, from ``levels`` levels.

    Infinite where an end would get mass that no level has.
    """
    inner = bins[start:stop]
    kept = inner.copy()
    below, above = bins[:start].sum(), bins[stop:].sum()
    if (below and not inner[0]) or (above and not inner[-1]):
        return np.inf
    kept[0] += below
    kept[-1] += above
    filled = inner > 0
    level = np.arange(len(inner)) * levels // len(inner)
    mass = np.bincount(level, inner, levels)
    share = np.bincount(level, filled, levels)
    spread = (mass[level] / np.maximum(share[level], 1))[filled]
    reference = kept[filled] / kept.sum()
    return float((reference * np.log(reference / (spread / spread.sum()))).sum())
