"""Costs for people: the unit that leaves a readable number, and limits on bit operations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import UsageError
from qopt.limits import QUANTITIES, Limit, parse_limit, readable

READABLE = [
    ("latency", 0.0123, "12.3 ms"),
    ("latency", 2.0, "2 s"),
    ("latency", 4.567e-5, "45.67 us"),
    ("latency", 1e-9, "0.001 us"),
    ("latency", 0.0, "0 us"),
    ("energy", 5e-6, "5 uJ"),
    ("energy", 2.5e-9, "2.5 nJ"),
    ("energy", 1.0, "1 J"),
    ("flash", 2097152.0, "2 MB"),
    ("sram", 9408.0, "9.188 KB"),
    ("size", 100.0, "100 B"),
    ("bops", 5.989e7, "59.89 M"),
    ("bops", 2e12, "2 T"),
    ("bits", 3.5, "3.5"),
    ("stored_bits", 4.14531, "4.145"),
]


@pytest.mark.parametrize(("quantity", "value", "text"), READABLE)
def test_readable(quantity: str, value: float, text: str) -> None:
    assert readable(quantity, value) == text


@settings(max_examples=200)
@given(st.sampled_from(QUANTITIES), st.floats(1e-12, 1e15))
def test_what_is_read_can_be_written_as_a_limit(quantity: str, value: float) -> None:
    text = readable(quantity, value)
    found = parse_limit(f"{quantity}<={text}")
    assert found.bound == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "bound"), [("bops<=60M", 60e6), ("bops<=1.5G", 1.5e9), ("bops<=2T", 2e12), ("bops<=7", 7.0)]
)
def test_limits_on_bit_operations(text: str, bound: float) -> None:
    assert parse_limit(text) == Limit("bops", bound)
    assert parse_limit(str(Limit("bops", bound))) == Limit("bops", bound)


def test_bit_operations_are_no_bytes() -> None:
    with pytest.raises(UsageError, match=r"wrong unit for bops \(expected no unit or M or G or T, got 'KB'\)"):
        parse_limit("bops<=5KB")
