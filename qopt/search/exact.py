"""The exact optimum of the multiple-choice knapsack of per-layer formats, by integer programming.

`scipy.optimize.milp` (HiGHS) takes every limit at once, the Lipschitz limit of `qopt.search.solver` among them, and
proves that no plan is better: 500 layers of 16 formats in about a second. Where it is not done in time, the better of
its plan and that of the greedy search stays, with what is known of the gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from qopt.errors import InfeasibleError, UsageError
from qopt.search import greedy
from qopt.search.ceiling import Ceiling, build_ceiling
from qopt.search.feasible import infeasible
from qopt.search.items import Item, build_items, total
from qopt.search.solver import Solved, minimise
from qopt.search.space import Outcome, Space
from qopt.spec import WeightSpec

PROVED = 1e-6
"""A gap up to which a plan is called optimal: tolerances of the solver add up to less."""

STARTS = 6
"""Greedy plans that are improved before the solver, which leaves out what only worse plans have."""


@final
@dataclass(frozen=True)
class ExactSearch:
    """Minimise the summed sensitivity under all limits at once, and prove it.

    ``seconds`` is when the solver stops; the plan is then as good as the note says, and may depend on the machine.
    """

    seconds: float = 60.0

    name: ClassVar[str] = "exact"
    uses_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise UsageError("a time limit is positive and finite", where="exact search", got=str(self.seconds))

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """All of the target's formats."""
        return target

    def __call__(self, space: Space) -> Outcome:
        """Solve; raises InfeasibleError where no combination keeps the limits, saying which and what can be reached."""
        items = build_items(space)
        ceiling = build_ceiling(space, items)
        solved, quick = proved(items, ceiling, self.seconds)
        picks = _better(items, solved.picks, quick)
        if picks is not None and solved.done and (gap := greedy.gap_of(total(items, picks), solved.bound)) <= PROVED:
            return greedy.outcome(space, items, picks, "optimal: no plan within the limits lowers the summed "
                                  f"sensitivity, proved by the solver to {100 * PROVED:g} %", gap)  # fmt: skip
        return self._fallen_back(space, items, ceiling, picks, solved.bound)

    def _fallen_back(
        self, space: Space, items: Sequence[Item], ceiling: Ceiling | None, picks: list[int] | None, bound: float
    ) -> Outcome:
        try:
            greedily, known = greedy.solve(items, ceiling)
        except InfeasibleError as error:
            raise infeasible(space) from error
        best = _better(items, picks, greedily)
        assert best is not None
        gap = greedy.gap_of(total(items, best), max(known, bound if math.isfinite(bound) else known))
        source = "the greedy search's plan" if best is greedily else "the solver's best plan"
        why = f"the solver proved no optimum within {self.seconds:g} s"
        note = f"{why}: {source} stays, and no plan lowers the summed sensitivity by more than {100 * gap:.2f} %"
        return greedy.outcome(space, items, best, note, gap)


def proved(items: Sequence[Item], ceiling: Ceiling | None, seconds: float) -> tuple[Solved, list[int] | None]:
    """What the solver finds beside a greedy plan, and that plan; None where no combination keeps the limits."""
    try:
        quick = greedy.best_plan(items, ceiling, greedy.prices(items), STARTS)
    except InfeasibleError:
        quick = None
    size = total(items, quick) if quick else sum(float(item.sensitivities.max()) for item in items)
    return minimise(items, ceiling, size, seconds, quick), quick


def _better(items: Sequence[Item], *plans: list[int] | None) -> list[int] | None:
    return min((p for p in plans if p is not None), key=lambda p: total(items, p), default=None)
