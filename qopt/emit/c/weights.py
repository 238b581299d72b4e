"""Rows of quantized weights as the C program stores and multiplies them.

| rows | formats | stored | multiplied by |
|---|---|---|---|
| int8 | int5..int8 | int8 | multiplication |
| digits | int2..int4, mid-rise, plugins | 1 to 4 bits, unpacked to int8 by a table | multiplication |
| ternary | ternary | five in a byte, unpacked to int8 | multiplication |
| log | log2..log4 | 2 to 4 bits, unpacked to a sign and a shift | shift, add or subtract |
| log8 | log5..log8 | int8: a sign and a shift | shift, add or subtract |
| signs | int1, log1 | one bit, 1 is +1 | add or subtract |
| xnor | int1, log1 behind 1-bit codes | one bit, 1 is +1 | xnor and counting bits |

A sign and a shift: 0 is zero, ``s + 1`` is ``2**s`` and ``-(s + 1)`` is ``-2**s``. Every row begins at a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from qopt.emit.c.steps import Rows
from qopt.errors import UnsupportedModelError
from qopt.quant import QuantizedWeight, pack
from qopt.spec import Packing

LARGEST_SHIFT = 30
"""Of a log level: what int32 holds."""


@final
@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows of one format.

    Attributes:
        rows: how they are stored.
        levels: int64 (rows, taps).
        unit: float64 (rows,), what level 1 weighs as a multiple of the scale.
        packed, table, bits: as `qopt.emit.c.steps.Part` has them.
    """

    rows: Rows
    levels: NDArray[np.int64]
    unit: NDArray[np.float64]
    packed: NDArray[Any]
    table: NDArray[np.int8] | None = None
    bits: int = 0


def encode(weight: QuantizedWeight, input_bits: int, layer: str) -> Encoded:
    """The rows of ``weight`` behind codes of ``input_bits`` bits.

    Raises:
        UnsupportedModelError: levels that no 32-bit accumulator takes, naming ``layer`` and the format.
    """
    codes = weight.codes.movedim(weight.axis, 0).numpy()
    codes = codes.reshape(len(codes), -1).astype(np.int64)
    one = np.ones(len(codes))
    if weight.spec.quantizer == "binary":
        return _signs(codes, input_bits == 1, one)
    if weight.table is None:
        if weight.spec.packing.base == 256:
            return Encoded("int8", codes, one, codes.astype(np.int8))
        base = weight.spec.packing.base
        table = np.array([digit if digit <= (base - 1) // 2 else digit - base for digit in range(base)], np.int8)
        kind: Rows = "ternary" if base == 3 else "digits"
        return Encoded(kind, codes, one, _pack(codes % base, weight.spec.packing), table, _bits(base))
    levels = weight.table.numpy()
    if weight.spec.quantizer == "log":
        return _log(codes, levels.astype(np.float64), weight.spec.packing, layer, str(weight.spec))
    if levels.dtype != np.int8:
        raise UnsupportedModelError(
            "levels that are no integers", where=layer, got=str(weight.spec), fix="use a format of up to 4 bits"
        )
    packing = weight.spec.packing
    return Encoded("digits", levels[codes].astype(np.int64), one, _pack(codes, packing), levels, _bits(packing.base))


def _bits(base: int) -> int:
    return 0 if base == 3 else base.bit_length() - 1


def _pack(digits: NDArray[np.int64], packing: Packing) -> NDArray[np.uint8]:
    return np.stack([pack(row, packing).reshape(-1) for row in digits])


def _signs(codes: NDArray[np.int64], count_bits: bool, unit: NDArray[np.float64]) -> Encoded:
    """Rows that are counted fill whole words of 32 bits, with ones: beside them the columns have zeros."""
    fill = -codes.shape[1] % 32 if count_bits else -codes.shape[1] % 8
    bits = np.pad(codes > 0, ((0, 0), (0, fill)), constant_values=True)
    return Encoded("xnor" if count_bits else "signs", codes, unit, np.packbits(bits, axis=1, bitorder="little"))


def _log(codes: NDArray[np.int64], table: NDArray[np.float64], packing: Packing, layer: str, spec: str) -> Encoded:
    """Levels in units of the smallest: of the table where it has up to 4 bits, else of what the row uses."""
    values = table[codes]
    magnitudes = np.where(values == 0, np.inf, np.abs(values))
    narrow = packing.base <= 16
    unit = np.full(len(codes), np.abs(table[table != 0]).min()) if narrow else magnitudes.min(axis=1)
    unit = np.where(np.isfinite(unit), unit, 1.0)
    levels = values / unit[:, None]
    if np.abs(levels).max() > 1 << LARGEST_SHIFT:
        raise UnsupportedModelError(
            "weights that differ too much in magnitude for shifts in 32 bits", where=layer,
            expected=f"at most 2**{LARGEST_SHIFT}", got=f"2**{np.log2(np.abs(levels).max()):.0f} in {spec}",
            fix="use log4 or int8",
        )  # fmt: skip
    if narrow:
        shifts, packed = _shifts(table / unit[0]), _pack(codes, packing)
        return Encoded("log", levels.astype(np.int64), unit, packed, shifts, _bits(packing.base))
    return Encoded("log8", levels.astype(np.int64), unit, _shifts(levels))


def _shifts(levels: NDArray[np.float64]) -> NDArray[np.int8]:
    magnitude = np.where(levels == 0, 1.0, np.abs(levels))
    return np.asarray(np.sign(levels) * (np.log2(magnitude) + 1), np.int8)
