"""Ranges of activations seen in a stream of batches, in bounded memory."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from qopt.errors import DataError, UsageError

HALF = 16384
"""Bins on either side of zero; the largest magnitude always lies in the outer half of them."""


PART = 1 << 20
"""Values binned at a time."""


@final
class RangeObserver:
    """Exact minimum and maximum, and a histogram; no activation is kept.

    The bins have a power of two as width, are aligned at zero and double in width when a value falls outside, merging
    pairs without loss: the state depends only on the values seen, not on their order or on how they were batched.
    A percentile is off by at most one bin, that is 1/8192 of the largest magnitude.
    """

    def __init__(self, where: str = "activations") -> None:
        self.where = where
        self.low = math.inf
        self.high = -math.inf
        self._exponent: int | None = None  # the bins are 2**exponent wide; None while only zeros were seen
        self._counts = torch.zeros(2 * HALF, dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self._counts.sum())

    @property
    def counts(self) -> Tensor:
        """int64 (2 * HALF,): bin ``i`` counts the values in ``[i - HALF, i - HALF + 1)``, in units of `bin_width`."""
        return self._counts.clone()

    @property
    def bin_width(self) -> float:
        """The width of a bin; 0 while only zeros were seen."""
        return 0.0 if self._exponent is None else 2.0**self._exponent

    def update(self, values: Tensor) -> None:
        """Take in a batch of any shape; raises DataError where a value is NaN or infinite, and leaves the state."""
        if values.numel() == 0:
            return
        flat = values.detach().reshape(-1).to(torch.float32)
        low, high = (float(bound) for bound in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                "activations that are NaN or infinite", where=self.where, fix="check the model and its data"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        per_unit = 0.0 if self._exponent is None else 2.0**-self._exponent
        for part in torch.split(flat, PART):
            index = torch.floor(part.to(torch.float64) * per_unit).to(torch.int64)
            self._counts += torch.bincount(index + HALF, minlength=2 * HALF).cpu()

    def bounds(self, percentile: float = 100.0) -> tuple[float, float]:
        """The values between which lies the central part: percentiles ``100 - percentile`` and ``percentile``.

        100 gives the exact minimum and maximum. Raises UsageError for a percentile outside (50, 100] and before any
        update.
        """
        if not 50 < percentile <= 100:
            raise UsageError("percentile out of range", expected="above 50, at most 100", got=str(percentile))
        if not self.count:
            raise UsageError("no activations were observed", where=self.where, fix="run the calibration images first")
        if percentile == 100:
            return self.low, self.high
        return self._quantile(1 - percentile / 100), self._quantile(percentile / 100)

    def _widen(self, magnitude: float) -> None:
        if magnitude == 0:
            return
        needed = math.frexp(magnitude)[1] - int(math.log2(HALF))  # magnitude < HALF * 2**needed
        if self._exponent is None:
            self._exponent = needed  # zeros alone sit in the bin that starts at 0, whatever the width
        elif needed > self._exponent:
            shift = min(needed - self._exponent, 62)
            merged = torch.arange(-HALF, HALF) >> shift
            self._counts = torch.zeros_like(self._counts).index_add_(0, merged + HALF, self._counts)
            self._exponent = needed

    def _quantile(self, fraction: float) -> float:
        """Linear between the two neighbouring ranks, as numpy does it; within a bin the values count as even."""
        rank = fraction * (self.count - 1)
        below, above = self._at_rank(math.floor(rank)), self._at_rank(math.ceil(rank))
        return below + (above - below) * (rank - math.floor(rank))

    def _at_rank(self, rank: int) -> float:
        reached = self._counts.cumsum(0)
        index = int(torch.searchsorted(reached, rank, right=True))
        inside = int(self._counts[index])
        place = (rank - (int(reached[index]) - inside) + 0.5) / inside
        return min(max((index - HALF + place) * self.bin_width, self.low), self.high)
