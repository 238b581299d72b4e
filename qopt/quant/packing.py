"""Codes in 2-, 4- and 8-bit containers, laid out as ONNX stores INT2, INT4 and INT8 raw data.

Elements follow each other in row-major order, the first in the lowest bits of its byte; the last byte is filled up with
zeros. Signed codes are two's complement.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UsageError, VerificationError


def pack(codes: NDArray[np.generic], bits: int, *, signed: bool) -> NDArray[np.uint8]:
    """The bytes, shape (ceil(size * bits / 8),), of integer ``codes`` of any shape.

    Raises:
        UsageError: for ``bits`` other than 2, 4, 8.
        VerificationError: for codes that are no integers or do not fit.
    """
    _check_bits(bits)
    if not np.issubdtype(codes.dtype, np.integer):
        raise VerificationError("codes that are no integers", got=str(codes.dtype))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    flat = codes.reshape(-1).astype(np.int64)
    if flat.size and not (low <= flat.min() and flat.max() <= high):
        got = f"{flat.min()}..{flat.max()}"
        raise VerificationError(f"codes that do not fit {bits} bits", expected=f"{low}..{high}", got=got)
    per_byte = 8 // bits
    lanes = np.zeros((-(-flat.size // per_byte), per_byte), dtype=np.uint8)
    lanes.reshape(-1)[: flat.size] = flat & (2**bits - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(lanes << shifts, axis=1)
    return packed


def unpack(
    packed: NDArray[np.uint8], bits: int, shape: Sequence[int], *, signed: bool
) -> NDArray[np.int8] | NDArray[np.uint8]:
    """The codes that ``pack`` took, in ``shape``: int8 where ``signed``, else uint8.

    Raises:
        UsageError: for ``bits`` other than 2, 4, 8, or where the number of bytes does not fit ``shape``.
    """
    _check_bits(bits)
    size = int(np.prod(shape, dtype=np.int64))
    per_byte = 8 // bits
    expected = -(-size // per_byte)
    if packed.shape != (expected,) or packed.dtype != np.uint8:
        got = f"{packed.dtype} {packed.shape}"
        raise UsageError("packed codes of a wrong size", expected=f"uint8 ({expected},)", got=got)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    lanes = ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:size].reshape(tuple(shape))
    if not signed:
        return lanes
    filler = np.uint8(8 - bits)
    return (lanes << filler).view(np.int8) >> filler.astype(np.int8)


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise UsageError("no such container", expected="2, 4 or 8 bits", got=str(bits))
