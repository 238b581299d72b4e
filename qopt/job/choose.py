"""Choose the plan: thresholds filter, the strategy solves, a short measurement on the select images decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import final

from qopt.config import Options
from qopt.errors import InfeasibleError, UsageError
from qopt.job.algorithm_one import narrowed
from qopt.job.evaluation import Evaluator
from qopt.job.journal import Journal
from qopt.job.lipschitz_limit import account, lipschitz_limit, reached
from qopt.job.prices import allocate_within, limit_row, limit_rows, spent
from qopt.job.row_formats import row_choices
from qopt.job.run import Run
from qopt.job.select import Entry, select
from qopt.job.sensitivity import adversarial_noise
from qopt.job.sensitivity import described as sensitivity_of
from qopt.job.sharing import Sharing, shared
from qopt.job.space import build_space, capable
from qopt.job.widths import Narrowed, with_widths
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.measure.norms import code_norms
from qopt.plan import Plan, uniform
from qopt.plugins import load
from qopt.quantize import ROUNDINGS, Applied, AppliedWeights
from qopt.report.model import EvaluatedPlan, LimitRow, MeasuredPlan, SearchFacts
from qopt.search.evaluation import Measure, MeasuredStrategy, front, knee
from qopt.search.greedy import GreedySearch
from qopt.search.lipschitz import LipschitzSearch
from qopt.search.quanos import QuanosSearch
from qopt.search.rows import RowChoices
from qopt.search.space import Outcome, Space, Strategy
from qopt.search.thresholds import Filtered, Thresholds, apply_thresholds
from qopt.search.uniform import UniformSearch
from qopt.spec import FLOAT_ACTIVATION, WeightSpec

AnyStrategy = Strategy | MeasuredStrategy

TIGHTENED = {"normal": (0.85,), "max": (0.85, 0.7)}
"""By effort, shares of the limits under which the search runs again, for plans to measure beside the first."""


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """The plan that was chosen, made real, with the space it came from and the account of how.

    ``norms`` holds, by layer, ``||W_q||_2``, ``||dW||_2`` and ``||dW||_inf`` of the codes as they were rounded in the
    end; layers that stay float are absent. ``limits`` holds the plan against each limit.
    """

    applied: AppliedWeights
    space: Space
    facts: SearchFacts
    norms: Mapping[str, tuple[NormBound, NormBound, NormBound]]
    limits: tuple[LimitRow, ...] = ()


def choose(run: Run, journal: Journal | None = None, sharing: Sharing | None = None) -> Choice:
    """Search and select, or apply the plan that the user gave.

    ``journal`` gets every plan that is measured, gives back those that it holds, and is told the best plan; ``sharing``
    lets other machines measure plans of the search.

    Raises:
        InfeasibleError: no plan keeps the limits.
        UsageError: an unknown strategy, a limit that nothing prices, or a strategy that needs images without any.
        PlanError: the user's plan does not fit the network.
    """
    if run.plan is not None:
        return _apply_given(run, run.plan)
    _check_lipschitz(run)
    strategy = _strategy(run)
    journal = journal or Journal()
    formats = strategy.candidates(run.target.weights)
    candidates = capable(run, formats)
    if isinstance(strategy, LipschitzSearch):
        candidates = narrowed(run, candidates)
    space = build_space(run, candidates, measured=strategy.uses_sensitivity)
    thresholds = resolve_thresholds(run.options, run.data is not None)
    widths = with_widths(
        run, space, thresholds, measured=strategy.uses_sensitivity, others=_affords_more(run)
    )  # fmt: skip
    run, space = widths.run, widths.space
    filtered = _filter(run, space) if strategy.uses_sensitivity else Filtered(space, 1.0, ())
    run.progress(f"search: {strategy.name}")
    with shared(sharing):
        outcomes = _searched(run, strategy, filtered.space, journal, sharing)
    entries, outcome = _plans(run, strategy, space, filtered, outcomes, widths.reasons), outcomes[0]
    entries += _alike(widths, strategy, thresholds)
    journal.propose(entries[0].plan)
    applied, evaluated = _decide(run, entries, journal)
    limit, steepness = lipschitz_limit(run), list[LimitRow]()
    if limit is not None:
        applied, evaluated, notes, row = _held(run, strategy, limit, (applied, evaluated), journal)
        outcome = replace(outcome, notes=(*outcome.notes, *notes))
        steepness.append(row)
    outcome = replace(outcome, notes=(*outcome.notes, *widths.said(applied.plan), *spent(run, applied)))
    journal.propose(applied.plan)
    facts = _facts(run, strategy, filtered, outcome, evaluated)
    facts = facts.model_copy(update={"measured": _measured(journal, applied.plan)})
    limits = (*limit_rows(run, applied), *steepness)
    return Choice(applied, space, facts, _norms(run, applied, space), limits)


def _strategy(run: Run) -> AnyStrategy:
    """The strategy that the options name, with what it needs to know of the network.

    Raises:
        UsageError: an unknown name, one that needs images without any, or formats of rows from one that measures.
    """
    strategy: AnyStrategy = load("qopt.searches", run.options.search, "--search")()
    measures = isinstance(strategy, MeasuredStrategy)
    if run.data is None and (measures or isinstance(strategy, QuanosSearch)):
        what = "measures plans on images" if measures else "measures how far an attack moves every layer"
        raise UsageError(f"the search {what}", where=f"--search {strategy.name}", fix="give --data")
    if measures and run.options.rows == "on":
        raise UsageError(
            "the search measures formats of whole layers", where="--rows", got="on", fix="leave out one of the two"
        )
    return replace(strategy, noise=adversarial_noise(run)) if isinstance(strategy, QuanosSearch) else strategy


def _searched(
    run: Run, strategy: AnyStrategy, space: Space, journal: Journal, sharing: Sharing | None
) -> list[Outcome]:
    """What the strategy found, best first."""
    if not isinstance(strategy, MeasuredStrategy):
        return [strategy(space)]
    evaluate = Evaluator(run, _base(run), journal, sharing)
    measure = Measure(evaluate, run.options.evaluations, run.seed("search", strategy.name))
    return list(strategy.search(space, measure))


def _check_lipschitz(run: Run) -> None:
    if lipschitz_limit(run) is not None and run.options.rows == "on":
        raise UsageError(
            "a limit on lipschitz chooses among formats of whole layers", where="--rows", got="on",
            fix="leave out one of the two",
        )  # fmt: skip


def _held(
    run: Run,
    strategy: AnyStrategy,
    limit: Limit,
    selected: tuple[AppliedWeights, list[EvaluatedPlan]],
    journal: Journal,
) -> tuple[AppliedWeights, list[EvaluatedPlan], tuple[str, ...], LimitRow]:
    """The plan held to the Lipschitz limit as it was rounded in the end, with what is to be said of it.

    Strategies keep the limit by codes to nearest. Where those of another rounding break it, plans are measured again
    without that rounding; a plan by a strategy that plays without limits stays, and fails the limit.

    Raises:
        InfeasibleError: the rounding that the user asked for breaks the limit.
    """
    applied, evaluated = selected
    assert isinstance(applied, Applied)
    bounds, said = reached(run, applied), list[str]()
    if bounds.last.lipschitz > limit.bound and applied.plan.rounding != "nearest":
        word = ROUNDINGS[applied.plan.rounding]
        broken = f"{word} raised the Lipschitz constant to {bounds.last.lipschitz:.3g}"
        if run.options.rounding != "auto":
            raise InfeasibleError(
                "the rounding breaks the limit", where=str(limit), got=broken,
                fix="leave --rounding auto or nearest",
            )  # fmt: skip
        nearest = replace(run, options=replace(run.options, rounding="nearest"))
        plan = applied.plan.with_changes(rounding="nearest")
        applied, again = select(nearest, [Entry(f"{strategy.name} within {limit}", plan)], journal)
        known = {row.digest for row in again}
        first = [row.model_copy(update={"chosen": False}) for row in evaluated if row.digest not in known]
        evaluated = [*first, *again]
        bounds = reached(run, applied)
        said.append(f"{broken}, above the limit: weights are rounded to nearest")
    row = limit_row(limit, "calculus", bounds.last.lipschitz)
    return applied, evaluated, (*said, account(run, bounds, limit)), row


def _decide(run: Run, entries: list[Entry], journal: Journal) -> tuple[AppliedWeights, list[EvaluatedPlan]]:
    """The plan that measures best on images; without them the first, as it is."""
    if run.data is not None:
        return select(run, entries, journal)
    needed = "what attacks need" if run.unattacked else "--data"
    run.left_out.append(f"activation quantization, bias correction and measured selection: they need {needed}")
    return run.weights.apply(entries[0].plan), []


def _measured(journal: Journal, chosen: Plan) -> list[MeasuredPlan]:
    """Every plan that was measured, with the front of bits and divergences."""
    records = journal.records
    found, asked = [evaluation for _, evaluation in records], chosen.with_changes(ranges={}).digest
    if not found:
        return []
    best, bend = set(front(found)), knee(found)
    return [
        MeasuredPlan(
            code_bits=one.code_bits, bytes=one.bytes, clean=one.clean, robust=one.robust, front=place in best,
            knee=place == bend, chosen=plan.digest == asked,
        )
        for place, (plan, one) in enumerate(records)
    ]  # fmt: skip


def _apply_given(run: Run, plan: Plan) -> Choice:
    """The user's own plan: nothing is searched, every figure is measured."""
    applied = run.weights.apply(plan)
    facts = SearchFacts(
        strategy="none, the plan was given", sensitivity="not used", thresholds="none", factor=1.0, relaxed=[],
        gap=None, evaluated=[], notes=spent(run, applied),
    )  # fmt: skip
    return described(run, applied, facts)


def described(run: Run, applied: AppliedWeights, facts: SearchFacts) -> Choice:
    """The choice of a plan that was made real outside the search, with its norms, held against the limits."""
    space = build_space(run, capable(run, ()), measured=False)
    limit, limits = lipschitz_limit(run), limit_rows(run, applied)
    if limit is not None and isinstance(applied, Applied):
        limits.append(limit_row(limit, "calculus", reached(run, applied).last.lipschitz))
    return Choice(applied, space, facts, _norms(run, applied, space), tuple(limits))


def _norms(run: Run, applied: AppliedWeights, space: Space) -> dict[str, tuple[NormBound, NormBound, NormBound]]:
    """Of the codes that were chosen; where they are those of a candidate, its own."""
    nearest = applied.plan.rounding == "nearest"
    known = {(layer.layer, c.spec): c for layer in space.layers for c in layer.candidates} if nearest else {}
    asked, found = applied.plan.weight_specs([layer.name for layer in run.prepared.layers]), {}
    for layer in run.prepared.layers:
        if layer.name not in applied.quantized.weights:
            continue
        codes = applied.quantized.weights[layer.name]
        same = known.get((layer.name, asked[layer.name]))
        if same is not None:
            found[layer.name] = same.norm, same.error, same.row_error
        else:
            found[layer.name] = code_norms(layer, run.weights.weight(layer), codes.dequantize())
    return found


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


def _base(run: Run) -> Plan:
    """What all plans of a run have in common."""
    activations = run.target.activations if run.data is not None else FLOAT_ACTIVATION
    data = "" if run.data is None else run.data.digest
    equalised = run.options.equalisation == "on"
    plan = uniform(activations=activations, model=run.prepared.digest, data=data, equalisation=equalised)
    return plan.with_changes(activations={name: str(spec) for name, spec in run.narrow.items()})


def _plans(
    run: Run, strategy: AnyStrategy, space: Space, filtered: Filtered, outcomes: Sequence[Outcome],
    tensors: Mapping[str, str],
) -> list[Entry]:  # fmt: skip
    """The plans that are measured, the searched one first.

    Additive sensitivities mislead where bits are few, and a plan well below the limit can be the better one: unless the
    effort is ``fast``, the search also runs over rows and, unless it is ``normal`` and the network large or the search
    has measured such plans itself, under tightened limits; at ``max`` the uniform plan joins. ``tensors`` has the
    reasons for formats of activations.
    """
    base, measures = _base(run), isinstance(strategy, MeasuredStrategy)
    names = [strategy.name, *(f"{strategy.name}, place {place}" for place in range(2, len(outcomes) + 1))]
    found = {} if run.options.rows == "on" else dict(zip(names, outcomes, strict=True))
    if run.data is not None and (measures or strategy.name in ("greedy", "exact")):
        if _affords_more(run) and found and not isinstance(strategy, MeasuredStrategy):
            found |= _tightened(run, strategy, space)
        if _allows_rows(run):
            with suppress(InfeasibleError) if found else nullcontext():
                rows = allocate_within(run, *_row_space(run, space, filtered))
                found["rows" if any(spec.rows for spec in rows.specs.values()) else "second order"] = rows
        if run.options.effort == "max" and run.options.rows != "on":
            with suppress(InfeasibleError):
                found["uniform"] = UniformSearch()(filtered.space)
    plans: dict[tuple[WeightSpec, ...], Entry] = {}
    for name, one in found.items():
        plan = _with_formats(base, one, tensors)
        plans.setdefault(tuple(one.specs.values()), Entry(name, plan, name in ("rows", "second order")))
    return list(plans.values())


def _alike(widths: Narrowed, strategy: AnyStrategy, thresholds: Thresholds) -> list[Entry]:
    """Plans whose activations all have one format, where they keep the limits."""
    found, solve = [], GreedySearch() if isinstance(strategy, MeasuredStrategy) else strategy
    for spec, other in widths.alike.items():
        with suppress(InfeasibleError):
            one = solve(apply_thresholds(other.space, thresholds).space)
            found.append(Entry(f"all activations {spec}", _with_formats(_base(other.run), one, {})))
    return found


def _with_formats(base: Plan, outcome: Outcome, tensors: Mapping[str, str]) -> Plan:
    """The plan of what a search found; ``tensors`` has the reasons for formats of activations."""
    weights = {layer: str(spec) for layer, spec in outcome.specs.items()}
    return base.with_changes(weights=weights, reasons={**outcome.reasons, **tensors})


def _affords_more(run: Run) -> bool:
    """Whether plans under tightened limits are measured, too."""
    return run.options.effort == "max" or (run.options.effort == "normal" and run.is_cheap)


def _allows_rows(run: Run) -> bool:
    options = run.options
    if lipschitz_limit(run) is not None:
        return False
    measured = options.effort != "fast" and options.rounding != "nearest" and options.thresholds == "auto"
    return options.rows == "on" or (options.rows == "auto" and measured)


def _row_space(run: Run, space: Space, filtered: Filtered) -> tuple[Space, dict[str, RowChoices]]:
    """The layers and what their rows choose from: what the thresholds leave where the user asked for thresholds.

    By default they do not filter rows: a row that the network hardly uses may be as coarse as it likes. Targets with
    less than 4 bits offer rows 1 bit too, which suits just those.
    """
    if run.options.thresholds != "auto":
        kept = {layer.layer: tuple(c.spec for c in layer.candidates) for layer in filtered.space.layers}
        return filtered.space, row_choices(run, kept)
    widths = {spec.container_bits for spec in run.target.weights}
    binary = (WeightSpec("int", 1),) if min(widths) < 4 else ()
    return space, row_choices(run, capable(run, tuple(dict.fromkeys((*binary, *run.target.weights)))))


def _tightened(run: Run, strategy: Strategy, space: Space) -> dict[str, Outcome]:
    """The search under tightened limits, the thresholds applied anew: they may have to be relaxed for them."""
    thresholds = resolve_thresholds(run.options, run.data is not None)
    found = {}
    for share in TIGHTENED[run.options.effort]:
        limits = tuple(
            limit if limit.quantity == "lipschitz" else replace(limit, bound=limit.bound * share)
            for limit in space.limits
        )
        with suppress(InfeasibleError):
            tight = apply_thresholds(replace(space, limits=limits), thresholds)
            found[f"{strategy.name} at {share:.0%} of the limits"] = strategy(tight.space)
    return found


def _facts(
    run: Run, strategy: AnyStrategy, filtered: Filtered, outcome: Outcome, evaluated: list[EvaluatedPlan]
) -> SearchFacts:
    has_data = run.data is not None
    form = resolve_thresholds(run.options, has_data) if strategy.uses_sensitivity else None
    described = {"paper": "paper", "none": "none"}
    thresholds = (
        "the strategy's own (paper)" if form is None else described.get(form.form, f"{form.form} <= {form.value:g}")
    )
    return SearchFacts(
        strategy=strategy.name,
        sensitivity=sensitivity_of(run) if strategy.uses_sensitivity else "norms of the weights",
        thresholds=thresholds, factor=filtered.factor, relaxed=list(filtered.relaxed), gap=outcome.gap,
        evaluated=evaluated, notes=list(outcome.notes),
    )  # fmt: skip
