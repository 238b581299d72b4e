"""Sensitivities refitted from measured plans, and the exact search on them, again and again.

What one layer does alone says little of what it does among quantized neighbours. So a plan's divergence is modelled
as a sum over layers whose terms are the sensitivities times factors that are not known: one of the network, one of
every layer, one of every layer and format. Bayesian ridge regression in the dual finds them from the few plans that
were measured: factors near 1 before anything is known, errors in proportion to what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray

from qopt.errors import InfeasibleError, UsageError
from qopt.search.evaluation import Ledger, Measure, Specs, front, knee
from qopt.search.exact import ExactSearch
from qopt.search.space import LayerSpace, Outcome, Space
from qopt.search.uniform import UniformSearch
from qopt.seeds import derive
from qopt.spec import WeightSpec

Solver = Callable[[Space], Outcome]

NETWORK, LAYER, FORMAT, NOISE = 0.7, 0.5, 0.25, 0.1
"""Standard deviations, before anything was measured, of the factors about 1 and of a plan's relative error."""

LEAST_FACTOR: Final = 0.05
"""No factor is lower: a format that looks harmless on a few plans is none."""

FINALISTS: Final = 3
"""Plans that are judged again in the end."""

SECONDS: Final = 20.0
"""How long the solver may take for one plan; a fraction of a second suffices as a rule."""


@final
@dataclass(frozen=True)
class RefitSearch:
    """Solve, measure plans around the solution, refit the sensitivities, solve again.

    The first plans are those of the measured sensitivities, within the limits and within ``tightened`` shares of them,
    and the best uniform one; then ``probes`` plans of randomly disturbed sensitivities, all measured at once. After
    that ``batch`` plans at once: that of the refitted ones, where it is new, and the first new ones of ``draws`` draws
    from what the factors may still be. It ends where no plan is new or the budget is spent.
    """

    probes: int = 5
    draws: int = 8
    batch: int = 2
    spread: float = 0.5
    tightened: tuple[float, ...] = (0.85,)

    name: ClassVar[str] = "refit"
    uses_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.probes < 0 or self.draws < 0 or self.batch < 1 or not self.spread > 0:
            raise UsageError(
                "probes and draws are counts, a batch is 1 or more, the spread positive", where="refit search"
            )

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """All of the target's formats."""
        return target

    def search(self, space: Space, measure: Measure) -> Sequence[Outcome]:
        """The best plans that were measured; raises InfeasibleError where no combination keeps the limits."""
        ledger, solver = Ledger(measure), ExactSearch(SECONDS)
        first = solver(space)
        plans = [("the measured sensitivities", first)]
        for share in self.tightened:
            with suppress(InfeasibleError):
                plans.append((f"the same within {share:.0%} of the limits", solver(tightened(space, share))))
        with suppress(InfeasibleError):
            plans.append(("uniform", UniformSearch()(space)))
        known = [outcome for _, outcome in plans]
        probes = self._probes(space, solver, known, derive(measure.seed, "refit", "probes"))
        ledger.add_all([*plans, *(("a probe", probe) for probe in probes)])
        self._refit(space, solver, ledger, np.random.default_rng(derive(measure.seed, "refit", "draws")))
        return finalists(ledger, first, self.name)

    def _probes(self, space: Space, solver: Solver, known: Sequence[Outcome], seed: int) -> list[Outcome]:
        """Plans of sensitivities whose layers were scaled at random, each a neighbour of the solution; none known."""
        rng, found = np.random.default_rng(seed), list[Outcome]()
        for _ in range(3 * self.probes):
            if len(found) == self.probes:
                break
            factors = np.exp(rng.normal(0.0, self.spread, len(space.layers)))
            table = [factor * _sensitivities(layer) for factor, layer in zip(factors, space.layers, strict=True)]
            probe = solver(with_sensitivities(space, table))
            if all(probe.specs != other.specs for other in (*known, *found)):
                found.append(probe)
        return found

    def _refit(self, space: Space, solver: Solver, ledger: Ledger, rng: np.random.Generator) -> None:
        """Refit, solve and measure, until no plan is new or the budget is spent."""
        while not ledger.full:
            model = Refitted.of(space, [(row.specs, evaluation.total) for _, row, evaluation in ledger.rows])
            plans = [("refitted sensitivities", solver(with_sensitivities(space, model.mean)))]
            for _ in range(self.draws):
                if len([None for _, plan in plans if not ledger.knows(plan)]) == self.batch:
                    break
                drawn = solver(with_sensitivities(space, model.draw(rng)))
                if all(drawn.specs != plan.specs for _, plan in plans):
                    plans.append(("a draw of refitted sensitivities", drawn))
            if all(ledger.knows(plan) for _, plan in plans):
                return
            ledger.add_all(plans)


@final
@dataclass(frozen=True, eq=False)
class Refitted:
    """Sensitivities after measurements: their mean, and random ones that fit the measurements as well.

    A plan t with format f in layer l has divergence ``sum_l s_lf (1 + g + u_l + v_lf)``, with independent normal
    factors, and is measured with an error in proportion to itself. Given the measurements ``d`` with prior mean ``m``
    and covariance ``K`` of the plans, the factors' mean is ``C (K + N)^-1 (d - m)``, C their covariance with the plans.

    Attributes:
        mean: of every layer, the sensitivity of each candidate.
    """

    mean: list[NDArray[np.float64]]
    _prior: NDArray[np.float64]
    _starts: NDArray[np.int64]
    _plans: NDArray[np.float64]
    _noise: NDArray[np.float64]
    _found: NDArray[np.float64]

    @staticmethod
    def of(space: Space, measured: Sequence[tuple[Specs, float]]) -> Refitted:
        """Fit to plans with their divergences; the scale of the sensitivities is taken from the measurements first."""
        table = [_sensitivities(layer) for layer in space.layers]
        starts = np.cumsum([0, *map(len, table)])
        chosen = np.zeros((len(measured), int(starts[-1])))
        for row, (specs, _) in zip(chosen, measured, strict=True):
            for start, layer in zip(starts, space.layers, strict=False):
                row[start + [c.spec for c in layer.candidates].index(specs[layer.layer])] = 1.0
        found = np.array([value for _, value in measured])
        prior = np.concatenate(table)
        sums = np.maximum(chosen @ prior, 1e-300)
        prior = prior * float(np.median(found / sums)) if found.any() else prior
        noise = NOISE * np.maximum(found, 1e-3 * max(float(found.max()), 1e-12))
        empty = Refitted([], prior, starts, chosen, noise, found)
        return replace(empty, mean=empty._split(empty._given(found, np.ones_like(prior))))

    def draw(self, rng: np.random.Generator) -> list[NDArray[np.float64]]:
        """Random sensitivities: factors from their prior, corrected by what they get wrong (Matheron's rule)."""
        layers = np.diff(self._starts)
        factors = 1.0 + rng.normal(0.0, NETWORK) + np.repeat(rng.normal(0.0, LAYER, len(layers)), layers)
        factors = factors + rng.normal(0.0, FORMAT, len(self._prior))
        errors = rng.normal(0.0, self._noise)
        return self._split(self._given(self._found + errors, factors))

    def _given(self, found: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """``factors`` corrected for the plans to have the divergences ``found``."""
        terms = self._plans * self._prior
        owner = np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))
        by_layer = np.add.reduceat(terms, self._starts[:-1], axis=1)
        total = terms.sum(axis=1)
        joint = NETWORK**2 * np.outer(total, total) + LAYER**2 * by_layer @ by_layer.T + FORMAT**2 * terms @ terms.T
        weights = np.linalg.solve(joint + np.diag(self._noise**2), found - terms @ factors)
        shift = NETWORK**2 * (total @ weights) + LAYER**2 * (weights @ by_layer)[owner] + FORMAT**2 * (weights @ terms)
        corrected: NDArray[np.float64] = factors + shift
        return corrected

    def _split(self, factors: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        values: NDArray[np.float64] = self._prior * np.maximum(factors, LEAST_FACTOR)
        return np.split(values, self._starts[1:-1])


def with_sensitivities(space: Space, table: Sequence[NDArray[np.float64]]) -> Space:
    """The space with other sensitivities: of every layer, one of each candidate."""
    layers = (
        replace(
            layer,
            candidates=tuple(
                replace(c, sensitivity=float(value)) for c, value in zip(layer.candidates, values, strict=True)
            ),
        )
        for layer, values in zip(space.layers, table, strict=True)
    )
    return replace(space, layers=tuple(layers))


def tightened(space: Space, share: float) -> Space:
    """The space with a ``share`` of every limit, but for those on the Lipschitz constant and on memory at once."""
    limits = tuple(
        replace(limit, bound=limit.bound * share) if limit in space.additive else limit for limit in space.limits
    )
    return replace(space, limits=limits)


def finalists(ledger: Ledger, first: Outcome, name: str) -> list[Outcome]:
    """The best plans measured, with how they came about and what they gained on the ``first``."""
    start, found = ledger.measured(first), []
    for origin, outcome, evaluation in ledger.best(FINALISTS):
        note = f"{len(ledger)} plans were measured, the best is that of {origin}: divergence {evaluation.total:.4g}"
        if start is not None and origin != ledger.rows[0][0]:
            note += f" against {start.total:.4g} of the plan that the solver began with"
        reasons = {layer: f"{name}, {origin}: {reason}" for layer, reason in outcome.reasons.items()}
        found.append(Outcome(outcome.specs, reasons, (note, _front_note(ledger))))
    return found


def _front_note(ledger: Ledger) -> str:
    measured = [evaluation for _, _, evaluation in ledger.rows]
    bend = measured[knee(measured)]
    figures = f"{bend.code_bits:.3g} bits, divergence {bend.clean:.3g} clean"
    figures += "" if bend.robust is None else f" and {bend.robust:.3g} attacked"
    return f"on the front of bits and divergences: {len(front(measured))} of them; its knee: {figures}"


def _sensitivities(layer: LayerSpace) -> NDArray[np.float64]:
    return np.array([candidate.sensitivity for candidate in layer.candidates])
