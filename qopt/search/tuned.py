"""Optuna over a few block weights that the solver decodes: every trial is a plan within the limits.

One parameter per layer is hopeless: six to nine times the optimum of 54 layers after 1000 trials. Here neighbouring
layers share a weight on their sensitivities, and one more parameter tightens the limits: 13 parameters by default,
whatever the network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from qopt.errors import InfeasibleError, UsageError
from qopt.search.evaluation import Evaluation, Ledger, Measure
from qopt.search.exact import ExactSearch
from qopt.search.refit import SECONDS, finalists, tightened, with_sensitivities
from qopt.search.space import Outcome, Space
from qopt.search.uniform import UniformSearch
from qopt.seeds import derive
from qopt.spec import WeightSpec

TRIALS: Final = 6
"""Trials for one measured plan, at most: many weights decode to one plan, which is measured once."""

SHARE: Final = "share of the limits"


@final
@dataclass(frozen=True)
class OptunaSearch:
    """TPE over the logarithms of ``blocks`` weights in [-spread, spread] and a share of the limits from ``least`` to 1.

    A trial's plan is that of the exact solver on the weighted sensitivities; ``batch`` of them are measured at once. The solver's own plan, the same within 85
    % of the limits and the best uniform plan are measured first. With attacks the objectives are the divergences on
    clean and on attacked images, else the first alone; the plans returned are those of the lowest sum.
    """

    blocks: int = 12
    spread: float = 2.0
    least: float = 0.8
    batch: int = 2

    name: ClassVar[str] = "optuna"
    uses_sensitivity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.blocks >= 1 and self.batch >= 1 and self.spread > 0 and 0 < self.least < 1):
            raise UsageError(
                "blocks and the batch are 1 or more, the spread positive, the least share below 1", where="optuna"
            )

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """All of the target's formats."""
        return target

    def search(self, space: Space, measure: Measure) -> Sequence[Outcome]:
        """The best plans that were measured; raises InfeasibleError where no combination keeps the limits."""
        ledger, decoder = Ledger(measure), _Decoder(space, self.blocks)
        start = decoder(decoder.neutral(1.0))
        assert start is not None  # else the solver says what is infeasible
        plans = [("the measured sensitivities", start)]
        with suppress(InfeasibleError):
            plans.append(("uniform", UniformSearch()(space)))
        ledger.add_all(plans)
        first = ledger.measured(start)
        assert first is not None
        self._optimise(decoder, ledger, attacked=first.robust is not None, budget=measure)
        return finalists(ledger, start, self.name)

    def _optimise(self, decoder: _Decoder, ledger: Ledger, *, attacked: bool, budget: Measure) -> None:
        study = _study(derive(budget.seed, "optuna") % 2**32, 2 if attacked else 1)
        study.enqueue_trial(decoder.neutral(1.0))
        study.enqueue_trial(decoder.neutral(0.85))
        for _ in range(0, TRIALS * budget.evaluations, self.batch):
            if ledger.full:
                return
            trials = [study.ask() for _ in range(self.batch)]
            plans = [decoder(self._weights(trial, decoder.names)) for trial in trials]
            ledger.add_all([(f"trial {t.number}", plan) for t, plan in zip(trials, plans, strict=True) if plan])
            for trial, plan in zip(trials, plans, strict=True):
                found = None if plan is None else ledger.measured(plan)
                if found is None:
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    study.tell(trial, _objectives(found, attacked=attacked))

    def _weights(self, trial: optuna.Trial, names: Sequence[str]) -> dict[str, float]:
        weights = {name: trial.suggest_float(name, -self.spread, self.spread) for name in names}
        return {**weights, SHARE: trial.suggest_float(SHARE, self.least, 1.0)}


class _Decoder:
    """From block weights and a share of the limits to the plan of the solver."""

    def __init__(self, space: Space, blocks: int) -> None:
        self._space, self._solver = space, ExactSearch(SECONDS)
        count = min(blocks, len(space.layers))
        self._owner = np.arange(len(space.layers)) * count // len(space.layers)
        self.names = [f"block {i}" for i in range(count)]

    def neutral(self, share: float) -> dict[str, float]:
        """Weights under which the sensitivities are as they are."""
        return {**dict.fromkeys(self.names, 0.0), SHARE: share}

    def __call__(self, weights: Mapping[str, float]) -> Outcome | None:
        """The plan; None where no plan is within the share of the limits. Raises InfeasibleError where that is all."""
        factors = [math.exp(weights[self.names[i]]) for i in self._owner]
        table = [
            factor * np.array([candidate.sensitivity for candidate in layer.candidates])
            for factor, layer in zip(factors, self._space.layers, strict=True)
        ]
        space = with_sensitivities(tightened(self._space, weights[SHARE]), table)
        try:
            return self._solver(space)
        except InfeasibleError:
            if weights[SHARE] == 1.0:
                raise
            return None


def _study(seed: int, objectives: int) -> optuna.Study:
    """A study in memory that says nothing, whatever the user's own studies do."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = TPESampler(seed=seed, n_startup_trials=8, constant_liar=True)
        return optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    finally:
        optuna.logging.set_verbosity(before)


def _objectives(found: Evaluation, *, attacked: bool) -> list[float]:
    return [found.clean, found.robust or 0.0] if attacked else [found.clean]
