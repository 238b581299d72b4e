"""Intervals for accuracies measured on a sample of images: one model, and two models on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np
import numpy.typing as npt

from qopt.errors import DataError

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: two-sided 95 %."""


@final
@dataclass(frozen=True)
class Interval:
    """A share in [0, 1] with its 95 % interval, measured on ``n`` images."""

    value: float
    low: float
    high: float
    n: int


@final
@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same ``n`` images, in points (percent of the images), in [-100, 100].

    ``standard_error`` is the plain one, 0 where a and b never disagree; ``low`` and ``high`` bound the difference at
    95 % and never close up, because no disagreement on n images does not prove that there is none.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Interval:
    """The Wilson score interval of ``successes`` out of ``n`` (Wilson 1927; Newcombe 1998, method 3).

    Raises:
        DataError: n is below 1, or successes lies outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError("not a count of successes", expected="0 <= successes <= n, n >= 1", got=f"{successes} of {n}")
    share = successes / n
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / scale
    # At 0 and n the bound is the share itself; the subtraction would leave a rounding error of either sign.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def accuracy_interval(correct: npt.ArrayLike) -> Interval:
    """The accuracy, as a share in [0, 1], of a vector (n,) that says for each image whether it was classified right.

    Raises:
        DataError: the vector is empty, not one-dimensional or not boolean.
    """
    vector = _booleans(correct, "correct")
    return wilson(int(vector.sum()), len(vector))


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedDifference:
    """Compare two models by vectors (n,) of booleans, both about the same images in the same order.

    With n10 images that only a gets right and n01 that only b does, the interval is the adjusted Wald one of
    Bonett and Price (2012): one image is added to either kind of disagreement, ``p = (count + 1) / (n + 2)``.

    Raises:
        DataError: a vector is empty, not one-dimensional or not boolean, or their lengths differ.
    """
    first, second = _booleans(a, "a"), _booleans(b, "b")
    if len(first) != len(second):
        raise DataError(
            "vectors of different length cannot be paired", expected=f"{len(first)} images", got=f"{len(second)}",
            fix="score both models on the same images",
        )  # fmt: skip
    n = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    difference = (only_first - only_second) / n
    error = sqrt(max((only_first + only_second) / n - difference**2, 0.0) / n)
    p10, p01 = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z95 * sqrt((p10 + p01 - (p10 - p01) ** 2) / (n + 2))
    low, high = max(p10 - p01 - half, -1.0), min(p10 - p01 + half, 1.0)
    return PairedDifference(100 * difference, 100 * error, 100 * low, 100 * high, n)


def _booleans(values: npt.ArrayLike, name: str) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != np.bool_ or not len(array):
        raise DataError(
            f"{name} must say for each image whether it was right", expected="a vector of at least one boolean",
            got=f"{array.dtype} of shape {array.shape}",
        )  # fmt: skip
    return array
