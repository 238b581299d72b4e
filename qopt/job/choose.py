"""Choose the plan: thresholds filter, the strategy solves, a short measurement on the select images decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qopt.config import Options
from qopt.job.run import Run
from qopt.job.space import build_space, probe_images
from qopt.measure.divergence import Probe
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan, uniform
from qopt.plugins import load
from qopt.quantize import Applied
from qopt.report.model import EvaluatedPlan, SearchFacts
from qopt.search.space import Outcome, Space, Strategy
from qopt.search.thresholds import Filtered, Thresholds, apply_thresholds
from qopt.size import code_bits
from qopt.spec import FLOAT_ACTIVATION, ActivationSpec


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """The plan that was chosen, made real, with the space it came from and the account of how."""

    applied: Applied
    space: Space
    facts: SearchFacts


def choose(run: Run) -> Choice:
    """Search and select, or apply the plan that the user gave.

    Raises:
        InfeasibleError: no plan keeps the limits.
        UsageError: an unknown strategy, or a limit that nothing prices.
        PlanError: the user's plan does not fit the network.
    """
    if run.plan is not None:
        return _apply_given(run, run.plan)
    strategy: Strategy = load("qopt.searches", run.options.search, "--search")()
    formats = strategy.candidates(run.target.weights)
    space = build_space(run, formats, measured=strategy.uses_sensitivity)
    filtered = _filter(run, space) if strategy.uses_sensitivity else Filtered(space, 1.0, ())
    run.progress(f"search: {strategy.name}")
    outcome = strategy(filtered.space)
    applied, evaluated = _select(run, outcome)
    return Choice(applied, space, _facts(run, strategy, filtered, outcome, evaluated))


def _apply_given(run: Run, plan: Plan) -> Choice:
    """The user's own plan: nothing is searched, every figure is measured."""
    specs = plan.weight_specs([layer.name for layer in run.prepared.layers])
    formats = tuple(dict.fromkeys(spec for spec in specs.values() if not spec.is_float))
    applied = run.quantizer.apply(plan)
    space = build_space(run, formats, measured=False)
    facts = SearchFacts(
        strategy="none, the plan was given", sensitivity="not used", thresholds="none", factor=1.0, relaxed=[],
        gap=None, evaluated=[], notes=[],
    )  # fmt: skip
    return Choice(applied, space, facts)


def resolve_thresholds(options: Options, has_data: bool) -> Thresholds:
    """The form that ``auto`` stands for: weighted with data, paper without; none without ``robust``."""
    if options.thresholds != "auto":
        return Thresholds(options.thresholds, options.threshold)
    if not options.robust:
        return Thresholds("none")
    return Thresholds("weighted" if has_data else "paper", options.threshold)


def _filter(run: Run, space: Space) -> Filtered:
    filtered = apply_thresholds(space, resolve_thresholds(run.options, run.data is not None))
    if filtered.factor > 1:
        run.warnings.append(
            f"no plan within the limits meets the thresholds: all were relaxed by {filtered.factor:.3g}, "
            f"because of {', '.join(filtered.relaxed)}"
        )
    return filtered


def _select(run: Run, outcome: Outcome) -> tuple[Applied, list[EvaluatedPlan]]:
    """Measure the plan with and without bias correction and keep the one that stays closer to float."""
    weights = {layer: str(spec) for layer, spec in outcome.specs.items()}
    activations = run.target.activations if run.data is not None else FLOAT_ACTIVATION
    base = _base_plan(run, activations).with_changes(weights=weights, reasons=outcome.reasons)
    if run.data is None:
        run.left_out.append("activation quantization, bias correction and measured selection: they need --data")
        return run.quantizer.apply(base), []
    variants = {"auto": (False, True), "on": (True,), "off": (False,)}[run.options.bias_correction]
    applied = [run.quantizer.apply(base.with_changes(bias_correction=correct)) for correct in variants]
    run.progress("measured selection")
    return _closest(run, applied)


def _base_plan(run: Run, activations: ActivationSpec) -> Plan:
    data = "" if run.data is None else run.data.digest
    return uniform(activations=activations, model=run.prepared.digest, data=data)


def _closest(run: Run, applied: list[Applied]) -> tuple[Applied, list[EvaluatedPlan]]:
    clean, adversarial = probe_images(run, "select")
    probes = [Probe.of(run.float_twin, images) for images in (clean, adversarial) if images is not None]
    divergences = [[probe.divergence(_twin(run, a)) for probe in probes] for a in applied]
    best = min(range(len(applied)), key=lambda i: sum(divergences[i]))
    rows = [
        EvaluatedPlan(
            name=f"{run.options.search}{', bias correction' if a.plan.bias_correction else ''}",
            digest=a.plan.digest, code_bits=code_bits(a.quantized.stored(run.prepared)),
            bias_correction=a.plan.bias_correction, clean_divergence=divergences[i][0],
            adversarial_divergence=divergences[i][1] if len(probes) > 1 else None, chosen=i == best,
        )
        for i, a in enumerate(applied)
    ]  # fmt: skip
    return applied[best], rows


def _twin(run: Run, applied: Applied) -> TwinClassifier:
    return TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)


def _facts(
    run: Run, strategy: Strategy, filtered: Filtered, outcome: Outcome, evaluated: list[EvaluatedPlan]
) -> SearchFacts:
    has_data = run.data is not None
    form = resolve_thresholds(run.options, has_data) if strategy.uses_sensitivity else None
    described = {"paper": "paper", "none": "none"}
    thresholds = (
        "the strategy's own (paper)" if form is None else described.get(form.form, f"{form.form} <= {form.value:g}")
    )
    images = "adversarial" if run.options.robust else "clean"
    measured = f"KL divergence on {images} images, one layer quantized at a time"
    sensitivity = measured if has_data else "squared relative error of the weights, no data"
    return SearchFacts(
        strategy=strategy.name, sensitivity=sensitivity if strategy.uses_sensitivity else "norms of the weights",
        thresholds=thresholds, factor=filtered.factor, relaxed=list(filtered.relaxed), gap=outcome.gap,
        evaluated=evaluated, notes=list(outcome.notes),
    )  # fmt: skip
