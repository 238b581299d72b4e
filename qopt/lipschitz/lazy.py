"""A spectral norm that is computed only as far as a threshold asks, and answers as the computed norm would."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from qopt.errors import UsageError
from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.cheap import LONGEST, Coarse
from qopt.lipschitz.spectral import EPS, spectral_norms


@final
class LazyNorm:
    """The spectral norm of matrices (groups, rows, columns), the largest of the groups' norms.

    Cheap intervals in float32 come first, in the order of their cost: the Frobenius norm, a few steps of the power
    method, row and column sums, the Gram matrices of blocks of rows, and that of all rows; see `cheap`.

    Args:
        weight: the matrices, any real dtype.
        other: what is subtracted from them; None for nothing.
        where: the layer's name, for errors.

    Attributes:
        lower: at most the norm.
        upper: at least the norm; infinity before anything is known.

    Raises:
        UsageError: for anything but batches of matrices of one shape, with entries.
    """

    def __init__(self, weight: Tensor, other: Tensor | None = None, *, where: str = "weight") -> None:
        if weight.ndim != 3 or not weight.numel() or (other is not None and other.shape != weight.shape):
            got = f"{tuple(weight.shape)}" + ("" if other is None else f" and {tuple(other.shape)}")
            raise UsageError("no batches of matrices of one shape", where=where, got=got)
        self.lower, self.upper = 0.0, math.inf
        self._weight, self._other, self._where = weight, other, where
        self._bound: NormBound | None = None
        self._open = dict.fromkeys(("frobenius", "stretch", "schur", "blocks"))
        self._solved = False
        _, rows, columns = weight.shape
        self._width = 16 * EPS * (rows + columns) * min(rows, columns)

    @property
    def computed(self) -> bool:
        """Whether eigenvalues of the whole Gram matrix were needed, be it in float32 or in float64."""
        return self._solved or self._bound is not None

    @property
    def bound(self) -> NormBound:
        """The norm as `reshaped_l2` computes it, computed where it was not.

        Raises:
            CorruptModelError: for NaN or infinite entries.
            UsageError: for matrices without entries.
        """
        if self._bound is None:
            self._bound = NormBound.largest(spectral_norms(self._exact(), where=self._where))
            self.narrow(self._bound.lower, self._bound.upper)
        return self._bound

    def narrow(self, lower: float, upper: float) -> None:
        """Take in what is known of the norm from elsewhere."""
        self.lower, self.upper = max(self.lower, lower), min(self.upper, upper)

    def at_most(self, threshold: float, *, compute: bool = True) -> bool | None:
        """Whether ``bound.upper <= threshold``; None where that needs the norm and ``compute`` is False.

        Raises what `bound` raises.
        """
        answer = self._known(threshold)
        if answer is None and self._open:
            self._try(threshold)
            answer = self._known(threshold)
        if answer is None and compute and not self._solved:
            self._solve()
            answer = self._known(threshold)
        return self.bound.upper <= threshold if answer is None and compute else answer

    def less_than(self, other: LazyNorm, *, compute: bool = True) -> bool | None:
        """Whether ``self.bound.upper < other.bound.upper``; None where only the norms tell and ``compute`` is False."""
        if self._ceiling() < other.lower:
            return True
        if self.lower >= other._ceiling():
            return False
        return self.bound.upper < other.bound.upper if compute else None

    def near(self, other: LazyNorm) -> None:
        """Take in the other's interval, widened by the distance: the Frobenius norm of the difference.

        Both must be of the same weight less another, or both of a weight alone, in one shape.
        """
        mine, theirs = self._second(), other._second()
        if sum(self._weight.shape[1:]) > LONGEST:
            return
        distance = 0.0 if mine is theirs else Coarse.of(mine, theirs, self._where).frobenius()
        outwards = 1 + 4 * EPS
        self.narrow(max(0.0, other.lower - distance * outwards) * (1 - 4 * EPS), (other.upper + distance) * outwards)

    def _second(self) -> Tensor:
        return self._weight if self._other is None else self._other

    def _exact(self) -> Tensor:
        return self._weight if self._other is None else self._weight.double() - self._other

    def _known(self, threshold: float) -> bool | None:
        if self._bound is not None:
            return self._bound.upper <= threshold
        if self.lower > threshold:
            return False
        return True if self._ceiling() <= threshold else None

    def _ceiling(self) -> float:
        """At least ``bound.upper``, which exceeds the norm by no more than the width that `spectral_norm` promises."""
        if self._bound is not None:
            return self._bound.upper
        if self.upper in (0.0, math.inf):
            return self.upper
        return math.nextafter(self.upper * (1 + self._width), math.inf)

    def _try(self, threshold: float) -> None:
        """The cheap intervals, each once, one after the other until the threshold is decided."""
        if sum(self._weight.shape[1:]) > LONGEST:
            self._open.clear()
            return
        coarse = Coarse.of(self._weight, self._other, self._where)
        for interval in list(self._open):
            if self._known(threshold) is not None:
                return
            if interval == "frobenius":
                self.narrow(0.0, coarse.frobenius())
            elif interval == "stretch":
                self.narrow(coarse.stretch(threshold), math.inf)
            elif interval == "schur":
                self.narrow(0.0, coarse.schur())
            elif coarse.blocks_may_tell(self.lower, threshold):
                self.narrow(0.0, coarse.blocks())
            else:
                return
            del self._open[interval]

    def _solve(self) -> None:
        """The interval of the Gram matrix in float32: half the work, and wide by a hundredth at most."""
        self._solved = True
        if sum(self._weight.shape[1:]) <= LONGEST:
            self.narrow(*Coarse.of(self._weight, self._other, self._where).gram())
