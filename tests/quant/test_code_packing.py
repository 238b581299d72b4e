"""Codes that share bytes: round trip, and the very bytes that ONNX would write for two bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from qopt.errors import UsageError, VerificationError
from qopt.quant import pack, powers, unpack
from qopt.spec import Packing, WeightSpec

PACKINGS = {name: WeightSpec.parse(name).packing for name in ("int1", "ternary", "int2", "int3")}


@st.composite
def codes(draw: st.DrawFn) -> tuple[NDArray[np.int64], Packing]:
    packing = draw(st.sampled_from(list(PACKINGS.values())))
    shape = draw(st.sampled_from([(0,), (1,), (2,), (3,), (5,), (8,), (4, 3), (2, 3, 3, 3), (7, 1)]))
    size = int(np.prod(shape))
    flat = draw(st.lists(st.integers(0, packing.base - 1), min_size=size, max_size=size))
    return np.array(flat, dtype=np.int64).reshape(shape), packing


@given(codes())
@settings(max_examples=150)
def test_round_trip(case: tuple[NDArray[np.int64], Packing]) -> None:
    values, packing = case
    packed = pack(values, packing)
    assert packed.dtype == np.uint8
    assert packed.shape == (-(-values.size // packing.codes), packing.bytes)
    back = unpack(packed, packing, values.shape)
    assert back.dtype == np.uint8
    assert np.array_equal(back, values)


@given(codes())
@settings(max_examples=100)
def test_powers_of_two_are_a_stream_of_bits(case: tuple[NDArray[np.int64], Packing]) -> None:
    """An oracle without arithmetic: the bits of all codes behind each other, lowest first."""
    values, packing = case
    if packing.base == 3:
        return
    width = {2: 1, 4: 2, 8: 3}[packing.base]
    bits = [int(code) >> place & 1 for code in values.reshape(-1) for place in range(width)]
    stream = np.packbits(np.array(bits, np.uint8), bitorder="little")
    packed = pack(values, packing).reshape(-1)
    assert np.array_equal(packed[: len(stream)], stream)
    assert not packed[len(stream) :].any()


def test_two_bits_are_those_of_onnx() -> None:
    values = np.random.default_rng(0).integers(0, 4, 37)
    stored = numpy_helper.from_array(values.astype(ml_dtypes.uint2)).raw_data
    assert pack(values, PACKINGS["int2"]).tobytes() == stored


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ([1, 2, 3, 0, 1], "int2", [[0b00111001], [0b01]]),
        ([1, 0, 0, 1, 0, 0, 0, 1, 1], "int1", [[0b10001001], [1]]),
        ([2, 1, 0, 0, 2, 1], "ternary", [[2 + 3 + 2 * 81], [1]]),
        ([2, 2, 2, 2, 2], "ternary", [[242]]),
        ([7, 0, 0, 0, 0, 0, 0, 7], "int3", [[7, 0, 0b11100000]]),
        ([1, 2, 3], "int3", [[0b11_010_001, 0, 0]]),
    ],
)
def test_golden_bytes(values: list[int], name: str, expected: list[list[int]]) -> None:
    assert pack(np.array(values), PACKINGS[name]).tolist() == expected


@pytest.mark.parametrize("name", PACKINGS)
def test_a_full_group_fills_its_bytes(name: str) -> None:
    """The last digits reach the last byte, none overflows, and no more codes would fit."""
    base, count, size = PACKINGS[name]
    assert base**count <= 256**size < base ** (count + 1)
    assert (
        unpack(pack(np.full(count, base - 1), PACKINGS[name]), PACKINGS[name], (count,)).tolist() == [base - 1] * count
    )


def test_high_digits_first_would_be_caught() -> None:
    """A planted mistake: the first code in the high digits."""
    values = np.array([1, 0, 2, 0, 0])
    swapped = np.array([[int(values @ 3 ** np.arange(5)[::-1])]], dtype=np.uint8)
    assert not np.array_equal(unpack(swapped, PACKINGS["ternary"], (5,)), values)


@pytest.mark.parametrize(("value", "name"), [(2, "int1"), (-1, "int1"), (3, "ternary"), (4, "int2"), (8, "int3")])
def test_codes_that_do_not_fit(value: int, name: str) -> None:
    with pytest.raises(VerificationError, match=f"do not fit base {PACKINGS[name].base}"):
        pack(np.array([0, value]), PACKINGS[name])


def test_codes_must_be_integers() -> None:
    with pytest.raises(VerificationError, match="float64"):
        pack(np.array([1.0]), PACKINGS["int2"])


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 3)])
def test_wrong_number_of_bytes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="wrong size"):
        unpack(np.zeros((2, 1), dtype=np.uint8), PACKINGS["int1"], (shape[0] if shape == (1,) else 40,))
    with pytest.raises(UsageError, match="wrong size"):
        unpack(np.zeros((3, 3), dtype=np.uint8), PACKINGS["int3"], shape)


def test_powers() -> None:
    assert powers(3, 5).tolist() == [1, 3, 9, 27, 81]
    assert powers(256, 3).dtype == np.int32
