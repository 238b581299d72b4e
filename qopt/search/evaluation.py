"""What strategies that measure are handed: a function from a plan to what it does to the network, and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final, runtime_checkable

import numpy as np

from qopt.search.space import Outcome, Space
from qopt.spec import WeightSpec

Specs = Mapping[str, WeightSpec]
"""Layer name to format, every layer of the space."""


@final
@dataclass(frozen=True)
class Evaluation:
    """What was measured of one plan made real, on the select images.

    Attributes:
        clean: mean KL divergence from float's predictions on clean images, in nats.
        robust: the same on the images that float withstands an attack on, on the worse of the examples made on float
            and on the plan's own twin, times their share of all images; None where nothing is attacked.
        code_bits: container bits per weight.
        bytes: bytes of codes, scales and tables.
    """

    clean: float
    robust: float | None
    code_bits: float
    bytes: int

    @property
    def total(self) -> float:
        """What plans are chosen by: both divergences, in nats."""
        return self.clean + (self.robust or 0.0)


Evaluate = Callable[[Sequence[Specs]], Sequence[Evaluation]]
"""Makes plans real and measures them, at once where there are machines for it; results in the order of the plans.

Equal plans give equal results, and only the first of them is computed."""


@final
@dataclass(frozen=True, eq=False)
class Measure:
    """What a measured search may use.

    Attributes:
        evaluate: measures plans.
        evaluations: different plans that may be measured, at most.
        seed: every random choice derives from it.
    """

    evaluate: Evaluate
    evaluations: int
    seed: int


@runtime_checkable
class MeasuredStrategy(Protocol):
    """A search that measures plans on the way, in the group `qopt.searches` beside those of `Strategy`.

    Given equal spaces, seeds and results of `Measure.evaluate`, it measures the same plans in the same order: that is
    what an interrupted run goes on from.

    Attributes:
        name: the word for it on the command line.
        uses_sensitivity: as of `Strategy`.
    """

    name: ClassVar[str]
    uses_sensitivity: ClassVar[bool]

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """The formats it wants facts for, given those of the target."""
        ...

    def search(self, space: Space, measure: Measure) -> Sequence[Outcome]:
        """The best plans that it measured, best first; at least one."""
        ...


def front(found: Sequence[Evaluation]) -> list[int]:
    """Places of those that no other undercuts: in code bits, clean or robust divergence, without being more in another.

    By code bits, then clean divergence; of equals only the first is there.
    """
    points = [_point(one) for one in found]
    kept = [
        i for i, mine in enumerate(points)
        if not any(_dominates(other, mine) or (other == mine and j < i) for j, other in enumerate(points))
    ]  # fmt: skip
    return sorted(kept, key=lambda i: points[i])


def knee(found: Sequence[Evaluation]) -> int:
    """The place on the `front` from which every further saving costs most: the one nearest to having the least of all.

    Distances are Euclidean, every quantity scaled to [0, 1] between its least and most on the front.
    """
    places = front(found)
    points = np.array([_point(found[place]) for place in places])
    spread = points.max(axis=0) - points.min(axis=0)
    scaled = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    return places[int(np.linalg.norm(scaled, axis=1).argmin())]


def _point(one: Evaluation) -> tuple[float, float, float]:
    return one.code_bits, one.clean, one.robust or 0.0


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@final
class Ledger:
    """The plans that one search measured, each once; it ends where the budget does."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._found: dict[tuple[tuple[str, WeightSpec], ...], tuple[str, Outcome, Evaluation]] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def full(self) -> bool:
        """Whether the budget is spent."""
        return len(self._found) >= self._measure.evaluations

    def knows(self, outcome: Outcome) -> bool:
        """Whether the plan was measured."""
        return _key(outcome.specs) in self._found

    def measured(self, outcome: Outcome) -> Evaluation | None:
        """What was measured of the plan; None where it was not."""
        found = self._found.get(_key(outcome.specs))
        return None if found is None else found[2]

    def add(self, origin: str, outcome: Outcome) -> Evaluation | None:
        """Measure a plan, at no cost where it was measured before; None where the budget is spent."""
        self.add_all([(origin, outcome)])
        return self.measured(outcome)

    def add_all(self, plans: Sequence[tuple[str, Outcome]]) -> None:
        """Measure plans at once, by origin: those that are new, the first of equals, as far as the budget goes."""
        new = {_key(outcome.specs): (origin, outcome) for origin, outcome in reversed(plans)}
        rows = [(key, *new[key]) for key in dict.fromkeys(_key(outcome.specs) for _, outcome in plans)]
        rows = [row for row in rows if row[0] not in self._found][: self._measure.evaluations - len(self)]
        if not rows:
            return
        found = self._measure.evaluate([outcome.specs for _, _, outcome in rows])
        for (key, origin, outcome), evaluation in zip(rows, found, strict=True):
            self._found[key] = (origin, outcome, evaluation)

    @property
    def rows(self) -> list[tuple[str, Outcome, Evaluation]]:
        """Origin, plan and measurement of all, in the order in which they were measured."""
        return list(self._found.values())

    def best(self, count: int) -> list[tuple[str, Outcome, Evaluation]]:
        """The ``count`` plans of lowest total divergence, the first measured of equals, best first."""
        return sorted(self._found.values(), key=lambda row: row[2].total)[:count]


def _key(specs: Specs) -> tuple[tuple[str, WeightSpec], ...]:
    return tuple(sorted(specs.items(), key=lambda entry: entry[0]))
