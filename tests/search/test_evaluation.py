"""What measured searches keep of what they measured: each plan once, within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.search.evaluation import Evaluation, Ledger, Measure, MeasuredStrategy, front, knee
from qopt.search.exact import ExactSearch
from qopt.search.greedy import GreedySearch
from qopt.search.quanos import QuanosSearch
from qopt.search.refit import RefitSearch
from qopt.search.space import Outcome
from qopt.search.tuned import OptunaSearch
from qopt.spec import WeightSpec

INT2, INT4, INT8 = map(WeightSpec.parse, ("int2", "int4", "int8"))


def measure(asked: list[Mapping[str, WeightSpec]], evaluations: int) -> Measure:
    """A plan is as far from float as its layers have bits fewer than 8."""

    def evaluate(plans: Sequence[Mapping[str, WeightSpec]]) -> list[Evaluation]:
        asked.extend(plans)
        lost = [float(sum(8 - spec.bits for spec in specs.values())) for specs in plans]
        return [Evaluation(value, value / 2, 4.0, 100) for value in lost]

    return Measure(evaluate, evaluations, 0)


def test_a_plan_is_measured_once_and_no_more_than_the_budget() -> None:
    asked: list[Mapping[str, WeightSpec]] = []
    ledger = Ledger(measure(asked, 2))
    one, same = Outcome({"a": INT2, "b": INT4}), Outcome({"b": INT4, "a": INT2})
    assert not ledger.knows(one)
    first = ledger.add("first", one)
    assert first == ledger.add("again", same) == ledger.measured(same)
    assert ledger.knows(same)
    assert (len(ledger), ledger.full, len(asked)) == (1, False, 1)
    assert ledger.add("second", Outcome({"a": INT8, "b": INT8})) is not None
    assert ledger.full
    assert ledger.add("too many", Outcome({"a": INT4, "b": INT4})) is None
    assert ledger.measured(Outcome({"a": INT4, "b": INT4})) is None
    assert ledger.add("known", one) == first, "a known plan costs nothing"
    assert len(asked) == 2


def test_plans_are_measured_at_once_each_new_one_once_and_within_the_budget() -> None:
    batches: list[int] = []
    inner = measure([], 3)

    def counted(plans: Sequence[Mapping[str, WeightSpec]]) -> Sequence[Evaluation]:
        batches.append(len(plans))
        return inner.evaluate(plans)

    ledger = Ledger(Measure(counted, 3, 0))
    a, b, c, d = (Outcome({"a": x, "b": y}) for x in (INT2, INT4) for y in (INT4, INT8))
    ledger.add("first", a)
    ledger.add_all([("known", a), ("one", b), ("the same", b), ("two", c), ("too many", d)])
    assert batches == [1, 2]
    assert [row[0] for row in ledger.rows] == ["first", "one", "two"]
    assert ledger.measured(d) is None
    ledger.add_all([("late", d)])
    assert batches == [1, 2], "nothing is asked for where the budget is spent"


def test_the_best_come_first_and_the_first_measured_of_equals() -> None:
    ledger = Ledger(measure([], 9))
    for origin, specs in {
        "x": (INT2, INT2), "y": (INT4, INT8), "z": (INT8, INT4), "w": (INT8, INT8),
    }.items():  # fmt: skip
        ledger.add(origin, Outcome(dict(zip("ab", specs, strict=True))))
    assert [row[0] for row in ledger.best(3)] == ["w", "y", "z"]
    assert [row[0] for row in ledger.rows] == ["x", "y", "z", "w"]
    assert [row[2].total for row in ledger.best(2)] == [0.0, 6.0]


@pytest.mark.parametrize(("robust", "total"), [(None, 0.5), (0.0, 0.5), (0.25, 0.75)])
def test_the_total_adds_what_attacks_do(robust: float | None, total: float) -> None:
    assert Evaluation(0.5, robust, 4.0, 1).total == total


def point(bits: float, clean: float, robust: float | None) -> Evaluation:
    return Evaluation(clean, robust, bits, 1)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(3.0, 1.0, 1.0)], [0]),
        ([(3.0, 1.0, 1.0), (2.0, 2.0, 2.0)], [1, 0]),
        ([(3.0, 1.0, 1.0), (3.0, 1.0, 2.0)], [0]),
        ([(3.0, 1.0, 1.0), (3.0, 1.0, 1.0)], [0]),
        ([(3.0, 1.0, 2.0), (3.0, 2.0, 1.0), (2.0, 3.0, 3.0), (2.5, 3.0, 3.0)], [2, 0, 1]),
        ([(3.0, 1.0, None), (2.0, 0.5, None)], [1]),
    ],
)
def test_the_front_is_what_nothing_undercuts(
    points: list[tuple[float, float, float | None]], expected: list[int]
) -> None:
    assert front([point(*one) for one in points]) == expected


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_front_and_knee_against_the_definition(points: list[tuple[int, int, int]]) -> None:
    found = [point(float(a), float(b), float(c)) for a, b, c in points]
    places = front(found)
    for i, mine in enumerate(points):
        beaten = [j for j, other in enumerate(points) if other != mine and np.all(np.array(other) <= mine)]
        assert (i in places) == (not beaten and points.index(mine) == i)
    assert knee(found) in places


def test_the_knee_is_where_both_ends_are_near() -> None:
    found = [point(2.0, 8.0, 8.0), point(3.0, 1.5, 1.0), point(8.0, 1.0, 0.9), point(2.5, 6.0, 6.0)]
    assert knee(found) == 1
    assert knee(found[:1]) == 0


@pytest.mark.parametrize(
    ("strategy", "measures"),
    [(RefitSearch, True), (OptunaSearch, True), (ExactSearch, False), (GreedySearch, False), (QuanosSearch, False)],
)
def test_what_measures_is_told_from_what_does_not(strategy: type, measures: bool) -> None:
    assert isinstance(strategy(), MeasuredStrategy) is measures
