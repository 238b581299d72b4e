"""Real multipliers as integers: how accumulators become codes without floating point.

A multiplier r is stored as mantissa and shift, ``r ~ mantissa * 2**-shift`` with |mantissa| in [2**30, 2**31), and

    rescale(a) = sign(a * mantissa) * ((|a * mantissa| + 2**(shift - 1)) >> shift)

which is ``a * r`` rounded to nearest, halves away from zero. Halves go away from zero because the rounding is then done
on magnitudes: C99 leaves the right shift of a negative number to the compiler, and only that of an unsigned one is the
same everywhere. (Jacob et al. 2018, section 2.2, with one rounding instead of two.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UnsupportedModelError

LIMIT = 1 << 30
"""Magnitudes are clipped here, so that a zero point can be added in 32 bits."""

LARGEST_SHIFT = 62


def multiplier(real: float, where: str) -> tuple[int, int]:
    """Mantissa and shift of ``real``, which may be negative or 0; the shift is 1 to 62.

    Raises:
        UnsupportedModelError: for a magnitude of 2**30 and more, naming ``where``.
    """
    (mantissa,), shift = multipliers((real,), where)
    return mantissa, shift


def multipliers(reals: tuple[float, ...], where: str) -> tuple[tuple[int, ...], int]:
    """Mantissas of several numbers under the shift of the largest; see `multiplier`."""
    largest = max(abs(real) for real in reals)
    shift = LARGEST_SHIFT if largest == 0 else min(31 - math.frexp(largest)[1], LARGEST_SHIFT)
    if round(largest * 2.0**shift) == 1 << 31:
        shift -= 1
    if shift < 1:
        raise UnsupportedModelError(
            "codes that differ too much in scale for a fixed-point multiplier", where=where, expected="below 2**30",
            got=f"{largest:.6g}", fix="calibrate the activations on other images",
        )  # fmt: skip
    return tuple(round(real * 2.0**shift) for real in reals), shift


def rescale(products: NDArray[np.int64], shift: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """``products / 2**shift`` to nearest, halves away from zero, within +-`LIMIT`; int64 below 2**62."""
    magnitude = (np.abs(products) + (np.int64(1) << (np.asarray(shift, np.int64) - 1))) >> np.asarray(shift, np.int64)
    rounded: NDArray[np.int64] = np.sign(products) * np.minimum(magnitude, LIMIT)
    return rounded
