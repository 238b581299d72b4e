"""A norm known up to an interval, and the one way a threshold may use it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from qopt.errors import VerificationError


@final
@dataclass(frozen=True)
class NormBound:
    """A norm that lies in [lower, upper]; rounding errors of the computation are inside the interval.

    A threshold accepts by ``upper`` and rejects by ``lower``; where it can do neither, the norm has to be refined.

    Attributes:
        lower: finite, zero or larger.
        upper: finite, at least ``lower``.
        method: how it was computed, for the report.

    Raises:
        VerificationError: where the two are no interval of finite numbers from zero on.
    """

    lower: float
    upper: float
    method: str

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.upper < math.inf:
            got = f"[{self.lower}, {self.upper}]"
            raise VerificationError("a norm bound that is no interval", where=self.method, got=got)

    @property
    def value(self) -> float:
        """The number to show and to add up: ``upper``, the end that is never too small."""
        return self.upper

    def accepts(self, threshold: float) -> bool:
        """Whether the norm is certainly at most ``threshold``."""
        return self.upper <= threshold

    def rejects(self, threshold: float) -> bool:
        """Whether the norm is certainly above ``threshold``."""
        return self.lower > threshold

    @staticmethod
    def largest(bounds: Iterable[NormBound]) -> NormBound:
        """The norm of a block-diagonal operator: the maximum of its blocks' norms, of which there must be one."""
        items = list(bounds)
        if not items:
            raise VerificationError("the largest of no norms")
        return NormBound(max(b.lower for b in items), max(b.upper for b in items), items[0].method)
