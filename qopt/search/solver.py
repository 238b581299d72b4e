"""Integer linear programs over items: HiGHS through `scipy.optimize.milp`, held to the exact limits afterwards.

One binary variable per item and choice, one row per budget. A Lipschitz limit adds one variable per node of the
potentials and one row per edge, ``v >= v_e``; where edges join, the rows ``v >= sum_e s_e v_e + H(s) / p`` for the
shares ``s`` of the plans met so far. All of them hold for every plan, so what the program allows is never less than
what the limit allows, and its bound is one for the real problem. A plan that comes out and breaks the limit is cut off
by the rows at its own shares, and the program is solved again: outer approximation of a convex problem (Duran and
Grossmann 1986), which ends, as each plan comes out once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix, vstack

from qopt.quiet import stdout_to_stderr
from qopt.search.ceiling import Ceiling, keeps
from qopt.search.items import BEYOND, FULL, Item, total
from qopt.search.potentials import entropy

SCALE: Final = 1e4
"""Budgets in the program: its absolute tolerance of 1e-6 is 1e-10 of a budget, and less than `FULL` leaves."""

TARGET: Final = 1e3
"""Size of the objective in the program, whose tolerance of 1e-6 is absolute too."""

SLACK: Final = 2e-4
"""By what part of the relaxation's value the best plan is looked for above it at first."""

GROWTH: Final = 5.0
"""How many times wider it is looked for where that was in vain."""

NEAR: Final = 1e-7
"""By what part more than the distance of a known plan is looked: tolerances of the relaxation are less."""

CLOSE: Final = 4e-3
"""A known plan within this part above the relaxation, or any where choices are so few, is looked below at once."""

SMALL: Final = 2000

CORE: Final = 0.7
"""A share of the choices from which on leaving the others out saves nothing."""

DONE, LIMITED, IMPOSSIBLE = 0, 1, 2
"""What `milp` says."""


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """What a program gave.

    Attributes:
        picks: the best plan found that keeps every limit, or None.
        bound: no plan within the limits has a lower objective; infinite where there is none at all.
        done: whether the solver says that the plan is optimal, or that there is none.
        rounds: programs solved.
    """

    picks: list[int] | None
    bound: float
    done: bool
    rounds: int


def minimise(
    items: Sequence[Item], ceiling: Ceiling | None, size: float, seconds: float, known: Sequence[int] | None = None
) -> Solved:
    """The plan of least summed sensitivity within the limits.

    Args:
        items: what is decided.
        ceiling: the Lipschitz limit, or None.
        size: about how large the sum will be; only a scale.
        seconds: when to stop with what is there.
        known: a plan within the limits: choices that only worse plans have are left out.
    """
    scale = TARGET / abs(size) if size else 1.0
    program = _Program(items, ceiling)
    program.objective[: program.choices] = scale * np.concatenate([item.sensitivities for item in items])
    best: list[int] | None = None
    worst = math.inf if known is None else scale * total(items, known)
    bound, rounds, ends = -math.inf, 0, time.monotonic() + seconds
    while True:
        found = program.solve(ends - time.monotonic(), worst)
        rounds += 1
        if found.status == IMPOSSIBLE:
            return Solved(best, math.inf if best is None else total(items, best), True, rounds)
        bound = max(bound, found.bound / scale)
        if found.picks is not None and keeps(items, ceiling, found.picks):
            best = min((p for p in (best, found.picks) if p is not None), key=lambda p: total(items, p))
            if found.status == DONE:
                return Solved(best, min(bound, total(items, best)), True, rounds)
        if found.status != DONE or found.picks is None:
            return Solved(best, bound, False, rounds)
        program.forbid(found.picks)


def gentlest_plan(items: Sequence[Item], ceiling: Ceiling, seconds: float) -> Solved:
    """A plan that keeps every limit, found by looking for the least Lipschitz constant within the additive ones.

    The bound is on the logarithm of that constant.
    """
    program = _Program(items, ceiling, capped=False)
    program.objective[-1] = 1.0
    bound, rounds, ends = -math.inf, 0, time.monotonic() + seconds
    while True:
        found = program.solve(ends - time.monotonic())
        rounds += 1
        bound = math.inf if found.status == IMPOSSIBLE else max(bound, found.bound)
        if found.picks is not None and keeps(items, ceiling, found.picks):
            return Solved(found.picks, bound, True, rounds)
        if found.status != DONE or found.picks is None or bound > ceiling.bound + 1e-6:
            return Solved(None, bound, bound > ceiling.bound, rounds)
        program.forbid(found.picks)


def relaxed_prices(items: Sequence[Item], seconds: float = 10.0) -> NDArray[np.float64]:
    """What a full budget is worth in the linear relaxation, by its dual, at least 0: (budgets,); zeros out of time."""
    size = float(np.sum([item.sensitivities.max() for item in items])) or 1.0
    program = _Program(items, None)
    program.objective[:] = TARGET / size * np.concatenate([item.sensitivities for item in items])
    relaxed = program.relax(*program.bounds(), seconds)
    found = np.zeros(items[0].costs.shape[1])
    return found if relaxed is None else SCALE * size / TARGET * relaxed.prices


@final
@dataclass(frozen=True, eq=False)
class _Relaxed:
    """The linear relaxation: its value, every choice's reduced cost, every row's price in the unit of the program."""

    value: float
    reduced: NDArray[np.float64]
    prices: NDArray[np.float64]


@final
@dataclass(frozen=True, eq=False)
class _Answer:
    status: int
    picks: list[int] | None
    bound: float
    value: float = math.inf


@final
@dataclass(eq=False)
class _Rows:
    """``low <= row . x <= high``, entry by entry."""

    columns: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[NDArray[np.float64]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, entries: Mapping[int, float], low: float, high: float) -> None:
        self.add_many(np.array(list(entries), np.int64), np.array(list(entries.values()), np.float64), low, high)

    def add_many(self, columns: NDArray[np.int64], values: NDArray[np.float64], low: float, high: float) -> None:
        self.columns.append(columns)
        self.values.append(values)
        self.low.append(low)
        self.high.append(high)

    def arrays(self, variables: int) -> tuple[csr_matrix, NDArray[np.float64], NDArray[np.float64]]:
        starts = np.cumsum([0, *map(len, self.columns)])
        shape = (len(self.low), variables)
        matrix = csr_matrix((np.concatenate(self.values), np.concatenate(self.columns), starts), shape)
        return matrix, np.array(self.low), np.array(self.high)


@final
class _Program:
    """Choices first, then the nodes of the potentials without the image, which is 0."""

    def __init__(self, items: Sequence[Item], ceiling: Ceiling | None, *, capped: bool = True) -> None:
        self._items, self._ceiling = items, ceiling
        self._starts = np.cumsum([0, *[len(item.specs) for item in items]])
        self.choices = int(self._starts[-1])
        self._variables = self.choices + (len(ceiling.potentials.nodes) - 1 if ceiling else 0)
        self.objective = np.zeros(self._variables)
        self._rows, self._budgets = _Rows(), items[0].costs.shape[1]
        for start, item in zip(self._starts, items, strict=False):
            count = len(item.specs)
            self._rows.add_many(np.arange(start, start + count), np.ones(count), 1.0, 1.0)
        room = SCALE * (FULL - 1e-10)
        for column in np.minimum(np.concatenate([item.costs for item in items]), BEYOND).T:
            self._rows.add_many(np.arange(self.choices), SCALE * column, -math.inf, room)
        self._capped = capped
        if ceiling is not None:
            self._place = {name: (i, k) for i, names in enumerate(ceiling.layers) for k, name in enumerate(names)}
            for node in range(1, len(ceiling.potentials.nodes)):
                for edge in range(len(ceiling.potentials.nodes[node].edges)):
                    self._cut(node, {edge: 1.0}, 0.0)
            self._touch(ceiling.least)

    def solve(self, seconds: float, worst: float = math.inf) -> _Answer:
        """Solve what is there; the time may be up before it began.

        First over the core: the choices whose reduced cost in the linear relaxation is below a slack. A plan with any
        other is above the relaxation by more than the slack, so a plan within it is the best of all. Where there is
        none, the slack grows to the best that was found, or to the ``worst`` objective that a plan is known to reach
        (Pisinger 1995).
        """
        low, high = self.bounds()
        if (low > high).any():
            return _Answer(IMPOSSIBLE, None, math.inf)
        ends = time.monotonic() + seconds
        relaxed = self.relax(low, high, seconds)
        if relaxed is None:
            return self._integers(low, high, ends)
        least, reduced = relaxed.value, relaxed.reduced
        size = max(abs(least), 1.0)
        enough = max((worst - least) * (1 + NEAR), 0.0) + NEAR * size
        at_once = enough <= CLOSE * size or (math.isfinite(enough) and self.choices <= SMALL)
        room = enough if at_once else SLACK * size
        while (core := reduced <= room).mean() <= CORE:
            chosen = np.append(core, np.ones(self._variables - self.choices, bool))
            found = self._integers(low, np.where(chosen, high, 0.0), ends)
            if found.status == DONE and found.value <= least + room:
                return found
            if found.status == LIMITED:
                return _Answer(found.status, found.picks, min(found.bound, least + room))
            wider = min(max(1.0001 * (found.value - least), 1.01 * room), GROWTH * room)
            room = min(wider, enough) if room < enough else wider
        return self._integers(low, high, ends)

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low, high = np.zeros(self._variables), np.ones(self._variables)
        if self._ceiling is not None:
            low[self.choices :] = self._ceiling.potentials.values(self._ceiling.least)[1:]
            high[self.choices :] = np.array(self._ceiling.potentials.values(self._ceiling.most)[1:]) + 1.0
            high[-1] = self._ceiling.bound if self._capped else high[-1]
        return low, high

    def relax(self, low: NDArray[np.float64], high: NDArray[np.float64], seconds: float) -> _Relaxed | None:
        """The least objective of mixtures of choices; None where it is not found."""
        if seconds <= 0:
            return None
        matrix, floor, roof = self._rows.arrays(self._variables)
        equal, above, below = floor == roof, (floor != roof) & np.isfinite(floor), (floor != roof) & np.isfinite(roof)
        free = np.where(np.arange(self._variables) < self.choices, math.inf, high)  # that choices sum to 1 caps them
        with stdout_to_stderr():
            found = linprog(
                self.objective, vstack([matrix[below], -matrix[above]]), np.append(roof[below], -floor[above]),
                matrix[equal], roof[equal], np.column_stack([low, free]), method="highs",
                options={"time_limit": seconds},
            )  # fmt: skip
        if found.status != 0:
            return None
        prices = np.maximum(-found.ineqlin.marginals[: self._budgets], 0.0)
        return _Relaxed(float(found.fun), found.lower.marginals[: self.choices], prices)

    def _integers(self, low: NDArray[np.float64], high: NDArray[np.float64], ends: float) -> _Answer:
        """Between these bounds; without presolve where that fails, as it does now and then."""
        whole = np.zeros(self._variables)
        whole[: self.choices] = 1
        matrix, floor, roof = self._rows.arrays(self._variables)
        for presolve in (True, False):
            seconds = ends - time.monotonic()
            if seconds <= 0:
                break
            with stdout_to_stderr():  # HiGHS prints there, whatever it is told
                found = milp(
                    self.objective, constraints=LinearConstraint(matrix, floor, roof), integrality=whole,
                    bounds=Bounds(low, high),
                    options={"mip_rel_gap": 0.0, "time_limit": seconds, "presolve": presolve},
                )  # fmt: skip
            if found.status in (DONE, LIMITED, IMPOSSIBLE):
                value = math.inf if found.fun is None else float(found.fun)
                return _Answer(int(found.status), self._picks(found), _bound(found), value)
        return _Answer(LIMITED, None, -math.inf)

    def forbid(self, picks: Sequence[int]) -> None:
        """Cut a plan off that breaks a limit: by the shares of its edges, and by name."""
        if self._ceiling is not None:
            self._touch(self._ceiling.norms(picks))
        chosen = self._starts[:-1] + np.array(picks)
        self._rows.add_many(chosen, np.ones(len(chosen)), -math.inf, len(chosen) - 1.0)

    def _touch(self, logs: Mapping[str, float]) -> None:
        """At every join, the row that holds with equality for these norms."""
        assert self._ceiling is not None
        potentials = self._ceiling.potentials
        for node, shares in enumerate(potentials.shares(logs)):
            if len(shares) > 1:
                self._cut(node, dict(enumerate(shares)), entropy(shares) / potentials.nodes[node].power)

    def _cut(self, node: int, shares: Mapping[int, float], constant: float) -> None:
        """``v - sum_e s_e (v_source + norm) >= sum_e s_e offset + constant``."""
        assert self._ceiling is not None
        entries: dict[int, float] = {self.choices + node - 1: 1.0}
        for index, share in shares.items():
            edge = self._ceiling.potentials.nodes[node].edges[index]
            constant += share * edge.offset
            if edge.source:
                _add(entries, self.choices + edge.source - 1, -share)
            if edge.layer is not None:
                item, row = self._place[edge.layer]
                for choice, log in enumerate(self._ceiling.logs[item][row]):
                    _add(entries, int(self._starts[item]) + choice, -share * float(log))
        self._rows.add(entries, constant, math.inf)

    def _picks(self, found: Any) -> list[int] | None:
        if found.x is None:
            return None
        return [int(found.x[a:b].argmax()) for a, b in zip(self._starts, self._starts[1:], strict=False)]


def _add(entries: dict[int, float], column: int, value: float) -> None:
    entries[column] = entries.get(column, 0.0) + value


def _bound(found: Any) -> float:
    bound = getattr(found, "mip_dual_bound", None)
    return -math.inf if bound is None or math.isnan(bound) else float(bound)
