"""Measuring plans for a search: made real, held against float on the select images, never the same plan twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import final

import numpy as np

from qopt.job.journal import Journal
from qopt.job.run import Run
from qopt.job.select import Variant, variants
from qopt.job.shards import Bench
from qopt.job.sharing import Crew, Sharing
from qopt.plan import Plan
from qopt.search.evaluation import Evaluation, Specs


@final
class Evaluator:
    """Measures plans of one run, as `qopt.search.evaluation.Evaluate`.

    A plan is rounded in one way, the best that the options' effort affords (`rounding_of`), and judged as `select`
    judges it before plans are held against each other. What the journal, the cache or, in a shared run, the storage
    holds is not computed again.

    Args:
        run: a run with images.
        base: what all plans have in common.
        journal: gets every plan.
        sharing: where other machines take part; None measures here alone.
    """

    def __init__(self, run: Run, base: Plan, journal: Journal, sharing: Sharing | None = None) -> None:
        variant = rounding_of(run)
        self._run, self._journal, self._bench = run, journal, Bench(run)
        self._base = base.with_changes(rounding=variant.rounding, bias_correction=variant.bias_correction)
        self._crew = sharing and Crew(sharing.begin(run, self._bench), self._bench, self._said)
        self._count = 0

    def __call__(self, plans: Sequence[Specs]) -> list[Evaluation]:
        """Make the plans real and measure them: one after the other, or all at once by those who share the run."""
        made = [self._plan(specs) for specs in plans]
        if self._crew is not None:
            rows = [(f"plan {self._count + place}", plan) for place, plan in enumerate(made, 1)]
            self._crew.announce([row for row in rows if self._known(row[1]) is None])
        return [self._one(plan) for plan in made]

    def _plan(self, specs: Specs) -> Plan:
        return self._base.with_changes(
            weights={layer.name: str(specs[layer.name]) for layer in self._run.prepared.layers}
        )

    def _one(self, plan: Plan) -> Evaluation:
        self._count += 1
        known = self._journal.measured(plan)
        if known is not None:
            return known
        self._run.progress(f"measured search: plan {self._count}")
        found = self._cached(plan, self._measured)
        self._journal.append(plan, found)
        return found

    def _known(self, plan: Plan) -> Evaluation | None:
        """What the journal or the cache holds of a plan."""
        try:
            return self._journal.measured(plan) or self._cached(plan, _missing)
        except LookupError:
            return None

    def _cached(self, plan: Plan, measure: Callable[[Plan], Evaluation]) -> Evaluation:
        def compute() -> dict[str, np.ndarray]:
            found = measure(plan)
            return {"values": np.array([math.nan if value is None else value for value in astuple(found)])}

        key = {**self._bench.conditions, "plan": plan.digest}
        clean, robust, bits, size = self._run.cache.arrays("evaluations", key, compute)["values"].tolist()
        return Evaluation(clean, None if math.isnan(robust) else robust, bits, int(size))

    def _measured(self, plan: Plan) -> Evaluation:
        if self._crew is not None:
            return self._crew.evaluation(plan)
        return self._bench.evaluation([self._bench.measure(plan, shard) for shard in self._bench.shards])

    def _said(self, words: str) -> None:
        self._run.progress(f"measured search: {words}")


def _missing(plan: Plan) -> Evaluation:
    raise LookupError(plan.digest)


def rounding_of(run: Run) -> Variant:
    """How plans are rounded while they are searched for: the best that the options leave open, but for AdaRound, which
    trains for minutes."""
    tried = variants(run.options)
    quick = [variant for variant in tried if variant.rounding != "adaround"]
    normal = [variant for variant in quick if variant == Variant("gptq", True)]
    if quick:
        return (normal or quick)[-1]
    return Variant("gptq", tried[-1].bias_correction)
