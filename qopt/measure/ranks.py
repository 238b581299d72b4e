"""How far one number predicts the order of another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from qopt.errors import DataError


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Spearman's rank correlation of two vectors (n,), in [-1, 1]; equal values share the mean of their ranks.

    None where there is no order to compare: fewer than two pairs, or all values of one vector the same.

    Raises:
        DataError: vectors of different lengths, or values that are not finite.
    """
    first, second = (np.asarray(values, np.float64) for values in (a, b))
    if first.ndim != 1 or first.shape != second.shape or not np.isfinite([first, second]).all():
        raise DataError("not two vectors of finite numbers, pair by pair", got=f"{first.shape} and {second.shape}")
    if len(first) < 2:
        return None
    one, two = (rankdata(values) - (len(first) + 1) / 2 for values in (first, second))
    spread = float(np.sqrt((one @ one) * (two @ two)))
    return None if spread == 0 else float(np.clip(one @ two / spread, -1, 1))
