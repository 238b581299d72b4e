"""Codes that share bytes: digits of base 2, 3, 4 or 8, as many in a group of bytes as `WeightSpec.packing` says.

Codes follow each other in row-major order, the first in the lowest digit of its group; a group's bytes are little
endian; the last group is filled up with zeros. For bases 2, 4 and 8 that is a plain stream of bits, lowest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UsageError, VerificationError
from qopt.spec import Packing


def pack(digits: NDArray[np.generic], packing: Packing) -> NDArray[np.uint8]:
    """The bytes, shape (groups, packing.bytes), of integer ``digits`` of any shape.

    Raises:
        VerificationError: for digits that are no integers or not below the base.
    """
    if not np.issubdtype(digits.dtype, np.integer):
        raise VerificationError("codes that are no integers", got=str(digits.dtype))
    flat = digits.reshape(-1).astype(np.int64)
    if flat.size and not (flat.min() >= 0 and flat.max() < packing.base):
        got = f"{flat.min()}..{flat.max()}"
        raise VerificationError(
            f"codes that do not fit base {packing.base}", expected=f"0..{packing.base - 1}", got=got
        )
    groups = np.zeros((-(-flat.size // packing.codes), packing.codes), np.int32)
    groups.reshape(-1)[: flat.size] = flat
    joined = groups @ powers(packing.base, packing.codes)
    return (joined[:, None] // powers(256, packing.bytes) % 256).astype(np.uint8)


def unpack(packed: NDArray[np.uint8], packing: Packing, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The digits that ``pack`` took, uint8 in ``shape``.

    Raises:
        UsageError: where the number of bytes does not fit ``shape``.
    """
    size = int(np.prod(shape, dtype=np.int64))
    expected = (-(-size // packing.codes), packing.bytes)
    if packed.shape != expected or packed.dtype != np.uint8:
        got = f"{packed.dtype} {packed.shape}"
        raise UsageError("packed codes of a wrong size", expected=f"uint8 {expected}", got=got)
    joined = packed.astype(np.int32) @ powers(256, packing.bytes)
    digits = joined[:, None] // powers(packing.base, packing.codes) % packing.base
    return digits.reshape(-1)[:size].reshape(tuple(shape)).astype(np.uint8)


def powers(base: int, count: int) -> NDArray[np.int32]:
    """``base**0 .. base**(count - 1)``, int32: what takes a group of digits apart and puts it together."""
    return np.asarray(base ** np.arange(count), np.int32)
