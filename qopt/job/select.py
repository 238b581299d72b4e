"""The last word on a plan: a short measured selection on held-out images, nothing assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, final

from torch import Tensor

from qopt.config import Options
from qopt.job.finals import Finals
from qopt.job.journal import Journal
from qopt.job.judge import Judge
from qopt.job.run import Run
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan
from qopt.quantize import Applied
from qopt.report.model import EvaluatedPlan
from qopt.search.evaluation import Evaluation


@final
@dataclass(frozen=True)
class Variant:
    """One way to make a plan real: how weights become codes, and whether biases absorb the mean shift."""

    rounding: Literal["nearest", "gptq", "adaround"]
    bias_correction: bool

    @property
    def label(self) -> str:
        """Words for the report."""
        return f"{self.rounding}{', bias correction' if self.bias_correction else ''}"


def variants(options: Options) -> list[Variant]:
    """What the options leave open, cheapest first."""
    tried: dict[str, list[Variant]] = {"fast": [Variant("nearest", False), Variant("nearest", True)]}
    tried["normal"] = [*tried["fast"], Variant("gptq", True)]
    tried["max"] = [*tried["normal"], Variant("gptq", False), Variant("adaround", True)]
    roundings: tuple[Literal["nearest", "gptq", "adaround"], ...] = ("nearest", "gptq", "adaround")
    every = [Variant(rounding, correct) for rounding, correct in product(roundings, (False, True))]
    asked = every if options.rounding != "auto" else tried[options.effort]
    kept = [v for v in asked if options.rounding in ("auto", v.rounding)]
    return [v for v in kept if options.bias_correction in ("auto", "on" if v.bias_correction else "off")]


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """A plan to be measured; ``gptq`` where it was made for that rounding, and is tried with no other."""

    name: str
    plan: Plan
    gptq: bool = False


def select(run: Run, entries: Sequence[Entry], journal: Journal) -> tuple[Applied, list[EvaluatedPlan]]:
    """Make the plans real and keep what stays closest to float on the select images.

    The first plan is tried in every variant, the others in the one that suits it best, and at effort ``max`` also in
    the one that suits it best of those that less effort tries: more effort never ends further away. Closest is the mean
    KL divergence from float on clean images. In a robust run, what happens to the images that float withstands an
    attack on is added, as the share that they are: on the examples made on the float network, or on those that a short
    PGD makes on the twin of any plan measured here, whichever moves it furthest from what float says of the clean
    image. So a plan gains nothing by gradients that its quantizers mask: what fools the plans beside it counts.

    Where gates are to be held, the closest plans are tried against them on more images (`Finals`): the closest that
    holds them all is kept, or where none does the one that misses them by least.

    ``journal`` gets every plan that is measured.
    """
    run.progress("measured selection")
    contest = _Contest(Judge.of(run), Finals(run), journal)
    first, *others = entries
    tried = variants(run.options)
    scores = {variant: contest.enter(run, first, variant) for variant in _suited(first, tried)}
    for entry in others:
        for variant in _carried(entry, tried, scores, run.options):
            contest.enter(run, entry, variant)
    return contest.settle()


def duel(run: Run, chosen: Applied, other: Run, name: str, plan: Plan) -> tuple[Applied, EvaluatedPlan, EvaluatedPlan]:
    """The plan chosen for ``run`` against one for a network of ``other`` that computes the same.

    Returns the second made real, and the rows of both: measured as `select` does, and by each other's examples.
    """
    contest = _Contest(Judge.of(run))
    contest.add(run, "", chosen)
    applied = other.quantizer.apply(plan)
    contest.add(other, f"{name}, {Variant(plan.rounding, plan.bias_correction).label}", applied)
    first, second = contest.settle()[1]
    return applied, first, second


def _carried(entry: Entry, tried: list[Variant], scores: Mapping[Variant, float], options: Options) -> list[Variant]:
    """The best of the first plan's variants for another one, and the best of those that normal effort tries."""
    lesser = variants(replace(options, effort="normal")) if options.effort == "max" else tried
    kept = (_suited(entry, tried), _suited(entry, [variant for variant in tried if variant in lesser]))
    best = [min(some, key=lambda variant: scores.get(variant, float("inf"))) for some in kept if some]
    return list(dict.fromkeys(best))


def _suited(entry: Entry, tried: list[Variant]) -> list[Variant]:
    """Those of ``tried`` that the plan is measured with; all where GPTQ is not among them."""
    return [variant for variant in tried if variant.rounding != "nearest"] or tried if entry.gptq else tried


@final
@dataclass(frozen=True, eq=False)
class _Contender:
    """A plan made real, with its place in the account and what an attack on its twin made, if one was made."""

    place: int
    applied: Applied
    twin: TwinClassifier
    examples: Tensor | None


class _Contest:
    """The plans measured so far; where nothing is attacked, all but the best few are let go."""

    def __init__(self, judge: Judge, finals: Finals | None = None, journal: Journal | None = None) -> None:
        self._judge, self._finals, self._journal = judge, finals, journal or Journal()
        self._rows: list[EvaluatedPlan] = []
        self._contenders: list[_Contender] = []

    def enter(self, run: Run, entry: Entry, variant: Variant) -> float:
        """Make a plan real in a variant and measure it; returns its divergence, by float's examples and its own."""
        plan = entry.plan.with_changes(rounding=variant.rounding, bias_correction=variant.bias_correction)
        self._journal.append(plan, self.add(run, f"{entry.name}, {variant.label}", run.quantizer.apply(plan)))
        return total(self._rows[-1])

    def add(self, run: Run, name: str, applied: Applied) -> Evaluation:
        """Measure a plan that is real already."""
        twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
        examples = self._judge.examples(twin)
        evaluation = self._judge.evaluation(run, applied, twin, examples)
        row = _row(name, applied, evaluation)
        self._contenders.append(_Contender(len(self._rows), applied, twin, examples))
        self._rows.append(row)
        if self._judge.held is None:
            self._contenders = self._closest()
        return evaluation

    def settle(self) -> tuple[Applied, list[EvaluatedPlan]]:
        """The plan of lowest divergence, the first of equals, and the account of all.

        Every plan is judged anew by the examples made on the twins of the others.
        """
        for one in self._contenders:
            for other in self._contenders:
                row = self._rows[one.place]
                if other.examples is not None and one is not other:
                    worst = max(row.adversarial_divergence or 0.0, self._judge.on(other.examples, one.twin))
                    self._rows[one.place] = row.model_copy(update={"adversarial_divergence": worst})
        best = self._final(self._closest())
        rows = [row.model_copy(update={"chosen": place == best.place}) for place, row in enumerate(self._rows)]
        return best.applied, rows

    def _closest(self) -> list[_Contender]:
        """The plans of lowest divergence, as many as there is room for in the finals, the first of equals first."""
        return sorted(self._contenders, key=lambda one: total(self._rows[one.place]))[
            : self._finals.places if self._finals else 1
        ]

    def _final(self, closest: list[_Contender]) -> _Contender:
        """The first that holds the gates, else the one that misses them by least."""
        if self._finals is None or len(closest) == 1:
            return closest[0]
        missed = {}
        for one in closest:
            trial = self._finals.trial(one.twin)
            drops = {"clean_drop": trial.clean_drop, "robust_drop": trial.robust_drop}
            self._rows[one.place] = self._rows[one.place].model_copy(update=drops)
            missed[one.place] = trial.excess(self._finals.gates)
        return min(closest, key=lambda one: missed[one.place])


def total(row: EvaluatedPlan) -> float:
    """What plans are chosen by: the divergence on clean images and, in a robust run, on attacked ones."""
    return row.clean_divergence + (row.adversarial_divergence or 0.0)


def _row(name: str, applied: Applied, found: Evaluation) -> EvaluatedPlan:
    return EvaluatedPlan(
        name=name, digest=applied.plan.digest, code_bits=found.code_bits, bias_correction=applied.plan.bias_correction,
        clean_divergence=found.clean, adversarial_divergence=found.robust, chosen=False,
    )  # fmt: skip
