"""Intervals and thresholds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.errors import VerificationError
from qopt.lipschitz import NormBound

norms = st.floats(0, 1e30)


@pytest.mark.parametrize(
    ("lower", "upper", "threshold", "accepts", "rejects"),
    [
        (1.0, 2.0, 3.0, True, False),
        (1.0, 2.0, 2.0, True, False),
        (1.0, 2.0, 1.5, False, False),  # has to be refined
        (1.0, 2.0, 1.0, False, False),
        (1.0, 2.0, 0.5, False, True),
        (0.0, 0.0, 0.0, True, False),
        (1.0, 1.0, 1.0, True, False),
    ],
)
def test_thresholds(lower: float, upper: float, threshold: float, accepts: bool, rejects: bool) -> None:
    bound = NormBound(lower, upper, "test")
    assert bound.accepts(threshold) is accepts
    assert bound.rejects(threshold) is rejects
    assert bound.value == upper


@given(norms, norms, norms, st.floats(0, 1))
def test_a_decision_holds_for_every_norm_in_the_interval(a: float, b: float, threshold: float, place: float) -> None:
    bound = NormBound(min(a, b), max(a, b), "test")
    norm = min(max(bound.lower + place * (bound.upper - bound.lower), bound.lower), bound.upper)
    assert not (bound.accepts(threshold) and norm > threshold)
    assert not (bound.rejects(threshold) and norm <= threshold)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(2.0, 1.0), (-1.0, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf)],
)
def test_no_interval_is_an_error(lower: float, upper: float) -> None:
    with pytest.raises(VerificationError, match="no interval"):
        NormBound(lower, upper, "test")


def test_largest_takes_both_ends() -> None:
    """The block of the largest lower end need not be that of the largest upper end."""
    assert NormBound.largest([NormBound(1.0, 4.0, "a"), NormBound(2.0, 3.0, "a")]) == NormBound(2.0, 4.0, "a")
    with pytest.raises(VerificationError):
        NormBound.largest([])
