"""Which formats of a layer meet Lipschitz thresholds, computing few of their norms and deciding as all of them would.

For a format with quantized weight ``W_q`` the questions of Algorithm 1 (Song, Ranjan, Li 2021) are
``||W_q|| <= T_q`` and ``||W - W_q|| <= T_d``. Both norms are `LazyNorm`; ``||W||``, ``||W_q||`` and ``||dW||`` bound
one another by the triangle inequality, and one question answered with no leaves the other alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.errors import UsageError
from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.lazy import LazyNorm
from qopt.lipschitz.reshaped import as_matrix
from qopt.lipschitz.spectral import EPS


@final
@dataclass(frozen=True)
class CandidateNorms:
    """The two norms of one format of one layer.

    Attributes:
        whole: ``||W||_2`` of the float weight.
        norm: ``||W_q||_2``.
        error: ``||W - W_q||_2``.
    """

    whole: NormBound
    norm: LazyNorm
    error: LazyNorm

    @staticmethod
    def of(
        weight: Tensor, quantized: Tensor, whole: NormBound, axis: int = 0, groups: int = 1, *, where: str = "weight"
    ) -> CandidateNorms:
        """The norms of the reshaped weights; ``whole`` is `reshaped_l2` of ``weight``, all else as there.

        The weights are held until they are garbage: let go of candidates that are decided.

        Raises:
            UsageError: for weights of different shapes, or as `as_matrix` does.
        """
        if weight.shape != quantized.shape:
            got = f"{tuple(quantized.shape)} beside {tuple(weight.shape)}"
            raise UsageError("a quantized weight of another shape", where=where, got=got)
        a, b = (as_matrix(w, axis, groups, where=where) for w in (weight, quantized))
        return CandidateNorms(whole, LazyNorm(b, where=where), LazyNorm(a, b, where=where))

    def norm_at_most(self, threshold: float, *, compute: bool = True) -> bool | None:
        """Whether ``||W_q|| <= threshold``, as `LazyNorm.at_most`, with what the other norms tell.

        Where ``||W|| + ||dW||`` might be small enough, cheap intervals of ``||dW||`` come first.
        """
        if self.error.lower <= threshold - self.whole.upper:
            self.error.at_most(threshold - self.whole.upper, compute=False)
        self._share()
        return self.norm.at_most(threshold, compute=compute)

    def error_at_most(self, threshold: float, *, compute: bool = True) -> bool | None:
        """Whether ``||W - W_q|| <= threshold``, as `LazyNorm.at_most`, with what the other norms tell."""
        self._share()
        return self.error.at_most(threshold, compute=compute)

    def meets(self, norm: float, error: float, *, compute: bool = True) -> bool | None:
        """Whether ``||W_q|| <= norm`` and ``||W - W_q|| <= error``; None where only a norm tells, not to compute."""
        small = self.error_at_most(error, compute=False)
        bounded = False if small is False else self.norm_at_most(norm, compute=False)
        if compute and small is None and bounded is not False:
            small = self.error_at_most(error)
        if compute and bounded is None and small:
            bounded = self.norm_at_most(norm)
        if small is False or bounded is False:
            return False
        return True if small and bounded else None

    def near(self, other: CandidateNorms) -> None:
        """Narrow both norms by those of another format of the same layer and the distance of the weights."""
        self.norm.near(other.norm)
        self.error.near(other.error)

    def _share(self) -> None:
        self.norm.narrow(*_third(self.whole.lower, self.whole.upper, self.error.lower, self.error.upper))
        self.error.narrow(*_third(self.whole.lower, self.whole.upper, self.norm.lower, self.norm.upper))


def decide(candidates: Sequence[CandidateNorms], norm: float, error: float) -> list[bool]:
    """Which of a layer's formats meet both thresholds, exactly as the full table of norms would have it.

    A norm is computed only where neither the cheap intervals nor the distance to a format that was computed tells.
    """
    answers = [candidate.meets(norm, error, compute=False) for candidate in candidates]
    computed: list[CandidateNorms] = []
    for index, candidate in enumerate(candidates):
        for other in reversed(computed):
            if answers[index] is None:
                candidate.near(other)
                answers[index] = candidate.meets(norm, error, compute=False)
        if answers[index] is None:
            answers[index] = candidate.meets(norm, error)
            computed.append(candidate)
    return [bool(answer) for answer in answers]


def choose(
    linear: Sequence[CandidateNorms], log: Sequence[CandidateNorms], norm: float, error: float
) -> tuple[CandidateNorms, bool]:
    """The format that Algorithm 1 takes for a layer, and whether it meets the thresholds.

    Of each method the first candidate that meets both, or else the one of lowest ``bound.upper`` of the error, the
    first of equals. Then linear where its error is strictly lower, else log.

    Args:
        linear: candidates in the order of their bits, at least one.
        log: as ``linear``.
        norm: the most that ``||W_q||`` may be.
        error: the most that ``||W - W_q||`` may be.
    """
    sides = [_contenders(side, norm, error) for side in (linear, log)]
    for own, others in (sides, sides[::-1]):
        if len(own) == 1 and all(own[0].error.less_than(c.error, compute=False) for c in others):
            return own[0], own[0].meets(norm, error) is True
    first, second = (_least_error(side) for side in sides)
    best = first if first.error.less_than(second.error) else second
    return best, best.meets(norm, error) is True


def _contenders(side: Sequence[CandidateNorms], norm: float, error: float) -> Sequence[CandidateNorms]:
    met = next((candidate for candidate in side if candidate.meets(norm, error)), None)
    return side if met is None else [met]


def _least_error(side: Sequence[CandidateNorms]) -> CandidateNorms:
    best = side[0]
    for candidate in side[1:]:
        best = candidate if candidate.error.less_than(best.error) else best
    return best


def _third(low_a: float, high_a: float, low_b: float, high_b: float) -> tuple[float, float]:
    """What the norm of ``A + B`` or ``A - B`` can be; rounding moves both ends outwards."""
    lower = max(low_a - high_b, low_b - high_a, 0.0) * (1 - 4 * EPS)
    return lower, math.nextafter((high_a + high_b) * (1 + 4 * EPS), math.inf)
