"""Fixed-point multipliers against fractions, rows against the weights they stand for."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qopt.emit.c.fixed_point import LIMIT, multiplier, multipliers, rescale
from qopt.emit.c.weights import Encoded, encode
from qopt.errors import UnsupportedModelError
from qopt.quant import QuantizedWeight, quantize_weight
from qopt.spec import WeightSpec

REALS = st.floats(1e-12, 1e6)


@given(real=REALS, sign=st.sampled_from([1, -1]))
def test_multipliers_are_close(real: float, sign: int) -> None:
    mantissa, shift = multiplier(sign * real, "l")
    assert 1 <= shift <= 62
    assert abs(mantissa) < 2**31
    assert (mantissa > 0) == (sign > 0) or mantissa == 0
    assert abs(Fraction(mantissa, 2**shift) - Fraction(sign * real)) <= Fraction(1, 2 ** (shift + 1))
    assert abs(mantissa) >= 2**30 or shift == 62


@given(sum_=st.integers(-(2**31), 2**31 - 1), real=REALS)
def test_rescale_rounds_halves_away_from_zero(sum_: int, real: float) -> None:
    mantissa, shift = multiplier(real, "l")
    exact = abs(Fraction(sum_ * mantissa, 2**shift))
    rounded = (2 * exact + 1).__floor__() // 2
    found = rescale(np.array([sum_ * mantissa], np.int64), shift)[0]
    assert found == (1 if sum_ > 0 else -1) * min(rounded, LIMIT)


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (-1, -1), (3, 2), (-3, -2), (5, 3), (4, 2), (0, 0)])
def test_halves(value: int, expected: int) -> None:
    mantissa, shift = multiplier(0.5, "l")
    assert rescale(np.array([value * mantissa]), shift)[0] == expected


@pytest.mark.parametrize("real", [1.0, 0.5, 2.0**-31, 1 - 2.0**-33, 2.0**29, 0.0])
def test_edges(real: float) -> None:
    mantissa, shift = multiplier(real, "l")
    assert Fraction(mantissa, 2**shift) == pytest.approx(Fraction(real), abs=2.0**-30)
    assert mantissa < 2**31


def test_too_large_a_multiplier() -> None:
    with pytest.raises(UnsupportedModelError, match=r"node 7: codes that differ too much"):
        multiplier(2.0**30, "node 7")


@given(a=st.floats(1e-6, 1e6), b=st.floats(1e-6, 1e6))
def test_two_multipliers_share_a_shift(a: float, b: float) -> None:
    (first, second), shift = multipliers((a, b), "l")
    assert max(first, second) >= 2**30 or shift == 62
    for mantissa, real in ((first, a), (second, b)):
        assert abs(Fraction(mantissa, 2**shift) - Fraction(real)) <= Fraction(1, 2 ** (shift + 1))


def rows_of(spec: str, bits: int = 8, taps: int = 13, seed: int = 0) -> tuple[QuantizedWeight, Encoded]:
    weight = torch.randn(5, taps, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_weight(weight, WeightSpec.parse(spec))
    assert isinstance(quantized, QuantizedWeight)
    return quantized, encode(quantized, bits, "l")


ROWS = {
    "int8": ("int8", 13), "int5": ("int8", 13), "int4": ("digits", 7), "int4:mid": ("digits", 7), "int3": ("digits", 6),
    "int2": ("digits", 4), "ternary": ("ternary", 3), "int1": ("signs", 2), "log1": ("signs", 2), "log2": ("log", 4),
    "log3": ("log", 6), "log4": ("log", 7), "log5": ("log8", 13),
}  # fmt: skip


@pytest.mark.parametrize("spec", ROWS)
def test_levels_times_units_are_the_weights(spec: str) -> None:
    quantized, rows = rows_of(spec)
    assert (rows.rows, rows.packed.shape[1]) == ROWS[spec]
    values = rows.levels * (rows.unit * quantized.scale.numpy())[:, None]
    assert np.allclose(values, quantized.dequantize().numpy(), rtol=1e-6, atol=0)


def unpacked(rows: Encoded, taps: int) -> Any:
    """The levels again, from the bytes and the table alone."""
    packed = rows.packed.astype(np.int64)
    if rows.rows in ("int8", "log8"):
        stored = packed
    elif rows.rows == "ternary":
        stored = np.stack([packed // 3**i % 3 for i in range(5)], -1).reshape(len(packed), -1)
    else:
        bits = np.unpackbits(rows.packed, axis=1, bitorder="little").astype(np.int64)
        width = max(rows.bits, 1)
        bits = bits[:, : bits.shape[1] // width * width].reshape(len(packed), -1, width)
        stored = (bits << np.arange(width)).sum(-1)
    stored = stored[:, :taps]
    if rows.table is not None:
        stored = rows.table.astype(np.int64)[stored]
    if rows.rows in ("signs", "xnor"):
        return 2 * stored - 1
    return np.sign(stored) * 2 ** np.maximum(np.abs(stored) - 1, 0) if "log" in rows.rows else stored


@pytest.mark.parametrize("spec", ROWS)
@pytest.mark.parametrize("taps", [1, 8, 13, 40])
def test_bytes_are_the_levels(spec: str, taps: int) -> None:
    _, rows = rows_of(spec, taps=taps, seed=taps)
    assert np.array_equal(unpacked(rows, taps), rows.levels)
    _, counted = rows_of(spec, 1, taps, taps)
    assert np.array_equal(unpacked(counted, taps), counted.levels)
    assert (counted.rows == "xnor") == (spec in ("int1", "log1"))
    if counted.rows == "xnor":
        fill = np.unpackbits(counted.packed, axis=1, bitorder="little")[:, taps:]
        assert counted.packed.shape[1] % 4 == 0
        assert fill.all()
