from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom

from qopt.errors import DataError
from qopt.statistics import Z95, Interval, accuracy_interval, paired_difference, wilson


# Newcombe (1998), Statistics in Medicine 17, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert (interval.value, interval.n) == (successes / n, n)


@pytest.mark.parametrize(("successes", "n"), [(3, 10), (50, 100), (99, 100), (1990, 2000)])
def test_wilson_bounds_solve_the_score_equation(successes: int, n: int) -> None:
    share, interval = successes / n, wilson(successes, n)

    def score(p: float) -> float:
        return (share - p) ** 2 - Z95**2 * p * (1 - p) / n

    assert interval.low == pytest.approx(brentq(score, 0.0, share), abs=1e-9)
    assert interval.high == pytest.approx(brentq(score, share, 1.0), abs=1e-9)


@given(n=st.integers(1, 5000), data=st.data())
@settings(max_examples=100)
def test_wilson_holds_its_share_and_mirrors(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    interval, mirror = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)


@pytest.mark.parametrize("n", [20, 200])
def test_wilson_covers_95_percent_on_average(n: int) -> None:
    intervals = [wilson(k, n) for k in range(n + 1)]
    coverage = []
    for p in np.linspace(0.02, 0.98, 97):
        holds = np.array([i.low <= p <= i.high for i in intervals])
        coverage.append(float((binom.pmf(np.arange(n + 1), n, p) * holds).sum()))
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.83


def test_accuracy_interval_counts_a_vector() -> None:
    assert accuracy_interval(np.array([True, False, True, True])) == wilson(3, 4)
    assert accuracy_interval([True]) == Interval(1.0, wilson(1, 1).low, 1.0, 1)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(DataError, match=f"got {successes} of {n}"):
        wilson(successes, n)


@pytest.mark.parametrize("vector", [[], [[True]], [0.5], [1, 0]])
def test_only_vectors_of_booleans_are_counted(vector: list[object]) -> None:
    with pytest.raises(DataError, match="boolean"):
        accuracy_interval(vector)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="boolean"):
        paired_difference([True], vector)  # type: ignore[arg-type]


def test_vectors_about_different_images_are_refused() -> None:
    with pytest.raises(DataError, match="expected 2 images, got 3"):
        paired_difference([True, True], [True, True, False])


outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
vectors = outcomes.map(lambda pairs: ([a for a, _ in pairs], [b for _, b in pairs]))


@given(pair=vectors)
@settings(max_examples=100)
def test_paired_difference_against_the_per_image_differences(pair: tuple[list[bool], list[bool]]) -> None:
    a, b = pair
    found = paired_difference(a, b)
    each = np.array(a, dtype=float) - np.array(b, dtype=float)
    assert found.difference == pytest.approx(100 * each.mean(), abs=1e-9)
    assert found.standard_error == pytest.approx(100 * each.std() / sqrt(len(a)), abs=1e-5)
    assert -100 <= found.low <= found.difference <= found.high <= 100
    assert found.low < found.high
    mirror = paired_difference(b, a)
    assert (mirror.difference, mirror.low, mirror.high) == pytest.approx((-found.difference, -found.high, -found.low))


@given(pair=vectors)
@settings(max_examples=100)
def test_paired_interval_is_wald_with_one_more_image_of_either_disagreement(
    pair: tuple[list[bool], list[bool]],
) -> None:
    each = np.array([*pair[0], True, False], dtype=float) - np.array([*pair[1], False, True], dtype=float)
    half = Z95 * each.std() / sqrt(len(each))
    found = paired_difference(*pair)
    assert found.low == pytest.approx(100 * max(each.mean() - half, -1), abs=1e-9)
    assert found.high == pytest.approx(100 * min(each.mean() + half, 1), abs=1e-9)


def test_no_disagreement_is_no_proof_of_equality() -> None:
    vector = np.arange(2000) % 10 > 0
    found = paired_difference(vector, vector.copy())
    assert (found.difference, found.standard_error, found.n) == (0.0, 0.0, 2000)
    assert found.high == pytest.approx(0.138, abs=0.001)
    assert found.low == -found.high


def test_pairing_is_sharper_than_two_intervals() -> None:
    a = np.arange(1000) % 10 > 0
    b = a.copy()
    b[1:6] = False
    found, apart = paired_difference(a, b), accuracy_interval(a)
    assert found.difference == pytest.approx(0.5)
    assert found.high - found.low < 0.5 * 100 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.5, 0.5), (0.9, 0.05)]
)
def test_paired_interval_covers_the_truth(only_a: float, only_b: float) -> None:
    generator = np.random.default_rng(4)
    truth, n, runs = 100 * (only_a - only_b), 100, 800
    holds = 0
    for kind in generator.choice(3, size=(runs, n), p=[only_a, only_b, 1 - only_a - only_b]):
        found = paired_difference(kind == 0, kind == 1)
        holds += found.low <= truth <= found.high
    assert holds / runs > 0.935
