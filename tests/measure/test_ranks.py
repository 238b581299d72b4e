"""Rank correlation against scipy, and where there is no order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from qopt.errors import DataError
from qopt.measure.ranks import spearman

VALUES = st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=30))
def test_spearman_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = ([pair[i] for pair in pairs] for i in range(2))
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    assert spearman(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic), abs=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20, unique=True))
def test_only_the_order_counts(values: list[float]) -> None:
    assert spearman(values, values) == 1.0
    assert spearman(values, [-value for value in values]) == -1.0
    assert spearman(np.argsort(np.argsort(values)), values) == 1.0


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [2.0]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])])
def test_where_there_is_no_order(a: list[float], b: list[float]) -> None:
    assert spearman(a, b) is None


@pytest.mark.parametrize(
    ("a", "b"), [([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2]), ([1, 2], [np.inf, 2]), ([[1, 2]], [[1, 2]])]
)
def test_no_two_vectors(a: list[float], b: list[float]) -> None:
    with pytest.raises(DataError, match="not two vectors"):
        spearman(a, b)
