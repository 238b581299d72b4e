"""Measuring plans for a search: made real, held against float on the select images, never the same plan twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any, final

import numpy as np

from qopt.cache import digest_arrays
from qopt.job.journal import Journal
from qopt.job.judge import Judge
from qopt.job.run import PROBE_STEPS, Run
from qopt.job.select import Variant, variants
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan
from qopt.search.evaluation import Evaluation, Specs


@final
class Evaluator:
    """Measures plans of one run, as `qopt.search.evaluation.Evaluate`.

    A plan is rounded in one way, the best that the options' effort affords (`rounding_of`), and judged as `select`
    judges it before plans are held against each other. What the journal or the cache holds is not computed again.

    Args:
        run: a run with images.
        base: what all plans have in common.
        journal: gets every plan.
    """

    def __init__(self, run: Run, base: Plan, journal: Journal) -> None:
        variant = rounding_of(run)
        self._run, self._journal = run, journal
        self._base = base.with_changes(rounding=variant.rounding, bias_correction=variant.bias_correction)
        self._count = 0

    def __call__(self, plans: Sequence[Specs]) -> list[Evaluation]:
        """Make the plans real and measure them, one after the other."""
        return [self._one(specs) for specs in plans]

    def _one(self, specs: Specs) -> Evaluation:
        weights = {layer.name: str(specs[layer.name]) for layer in self._run.prepared.layers}
        plan = self._base.with_changes(weights=weights)
        self._count += 1
        known = self._journal.measured(plan)
        if known is not None:
            return known
        self._run.progress(f"measured search: plan {self._count}")
        found = self._cached(plan)
        self._journal.append(plan, found)
        return found

    def _cached(self, plan: Plan) -> Evaluation:
        def compute() -> dict[str, np.ndarray]:
            found = self._measured(plan)
            return {"values": np.array([math.nan if value is None else value for value in astuple(found)])}

        key = {**self._conditions, "plan": plan.digest}
        clean, robust, bits, size = self._run.cache.arrays("evaluations", key, compute)["values"].tolist()
        return Evaluation(clean, None if math.isnan(robust) else robust, bits, int(size))

    def _measured(self, plan: Plan) -> Evaluation:
        applied = self._run.quantizer.apply(plan)
        twin = TwinClassifier(applied.graph, self._run.normalisation, self._run.prepared.batch)
        return self._judge.evaluation(self._run, applied, twin, self._judge.examples(twin))

    @cached_property
    def _judge(self) -> Judge:
        return Judge.of(self._run)

    @cached_property
    def _conditions(self) -> Mapping[str, Any]:
        """What measurements depend on beside the plan."""
        run = self._run
        assert run.data is not None
        few = run.data.select.first(run.probe_images)
        calibration = run.quantizer.calibration
        return {
            "model": run.prepared.digest, "images": digest_arrays(few.images, few.labels),
            "calibration": "" if calibration is None else digest_arrays(calibration.numpy()),
            "threat": [run.threat.norm, run.threat.eps] if run.options.robust else [], "steps": PROBE_STEPS,
            "seed": run.options.seed, "normalisation": [run.options.mean, run.options.std],
        }  # fmt: skip


def rounding_of(run: Run) -> Variant:
    """How plans are rounded while they are searched for: the best that the options leave open, but for AdaRound, which
    trains for minutes."""
    tried = variants(run.options)
    quick = [variant for variant in tried if variant.rounding != "adaround"]
    normal = [variant for variant in quick if variant == Variant("gptq", True)]
    if quick:
        return (normal or quick)[-1]
    return Variant("gptq", tried[-1].bias_correction)
