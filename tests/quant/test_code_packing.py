"""Packed codes: round trip, and the very bytes that ONNX writes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from qopt.errors import UsageError, VerificationError
from qopt.quant import pack, unpack

ONNX_TYPES = {
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (2, True): ml_dtypes.int2,
    (2, False): ml_dtypes.uint2,
    (8, True): np.int8,
    (8, False): np.uint8,
}


@st.composite
def codes(draw: st.DrawFn) -> tuple[NDArray[np.int64], int, bool]:
    bits, signed = draw(st.sampled_from(sorted(ONNX_TYPES)))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shape = draw(st.sampled_from([(0,), (1,), (2,), (3,), (5,), (4, 3), (2, 3, 3, 3), (7, 1)]))
    flat = draw(st.lists(st.integers(low, high), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(flat, dtype=np.int64).reshape(shape), bits, signed


@given(codes())
@settings(deadline=None, max_examples=150)
def test_round_trip(case: tuple[NDArray[np.int64], int, bool]) -> None:
    values, bits, signed = case
    packed = pack(values, bits, signed=signed)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-values.size * bits // 8),)
    back = unpack(packed, bits, values.shape, signed=signed)
    assert back.dtype == (np.int8 if signed else np.uint8)
    assert np.array_equal(back, values)


@given(codes())
@settings(deadline=None, max_examples=100)
def test_the_bytes_are_those_of_onnx(case: tuple[NDArray[np.int64], int, bool]) -> None:
    values, bits, signed = case
    stored = numpy_helper.from_array(values.astype(ONNX_TYPES[bits, signed])).raw_data
    assert pack(values, bits, signed=signed).tobytes() == stored


@pytest.mark.parametrize(
    ("values", "bits", "signed", "expected"),
    [
        ([1, 2, 3], 4, False, [0x21, 0x03]),
        ([-1, 7, -8], 4, True, [0x7F, 0x08]),
        ([1, 2, 3, 0, 1], 2, False, [0b00111001, 0b01]),
        ([1, -1, -2, 0], 2, True, [0b00101101]),
        ([-1, 127, -128], 8, True, [255, 127, 128]),
    ],
)
def test_golden_bytes(values: list[int], bits: int, signed: bool, expected: list[int]) -> None:
    assert pack(np.array(values), bits, signed=signed).tolist() == expected


def test_high_bits_first_would_be_caught() -> None:
    """A planted mistake: the first element in the high bits."""
    values = np.array([1, 2, 3, 4])
    swapped = np.array([values[0] << 4 | values[1], values[2] << 4 | values[3]], dtype=np.uint8)
    assert not np.array_equal(unpack(swapped, 4, (4,), signed=False), values)


@pytest.mark.parametrize(
    ("values", "bits", "signed"),
    [([8], 4, True), ([-9], 4, True), ([16], 4, False), ([-1], 4, False), ([2], 2, True), ([4], 2, False),
     ([256], 8, False)],
)  # fmt: skip
def test_codes_that_do_not_fit(values: list[int], bits: int, signed: bool) -> None:
    with pytest.raises(VerificationError, match=f"do not fit {bits} bits"):
        pack(np.array(values), bits, signed=signed)


def test_codes_must_be_integers() -> None:
    with pytest.raises(VerificationError, match="float64"):
        pack(np.array([1.0]), 4, signed=True)


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_unknown_containers(bits: int) -> None:
    with pytest.raises(UsageError, match="container"):
        pack(np.array([0]), bits, signed=True)
    with pytest.raises(UsageError, match="container"):
        unpack(np.zeros(1, dtype=np.uint8), bits, (1,), signed=True)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_wrong_number_of_bytes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="wrong size"):
        unpack(np.zeros(2, dtype=np.uint8), 4, shape, signed=True)
