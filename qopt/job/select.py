"""The last word on a plan: a short measured selection on held-out images, nothing assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, final

import torch
from torch import Tensor

from qopt.attacks import PGD
from qopt.config import Options
from qopt.job.run import PROBE_STEPS, Run
from qopt.job.space import probe_images, withstood
from qopt.measure.divergence import Probe
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.plan import Plan
from qopt.quantize import Applied
from qopt.report.model import EvaluatedPlan
from qopt.size import code_bits


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


def select(run: Run, entries: Sequence[Entry]) -> tuple[Applied, list[EvaluatedPlan]]:
    """Make the plans real and keep what stays closest to float on the select images.

    The first plan is tried in every variant, the others in the one that suits it best, and at effort ``max`` also in
    the one that suits it best of those that less effort tries: more effort never ends further away. Closest is the mean
    KL divergence from float on clean images. In a robust run, what happens to the images that float withstands an
    attack on is added, as the share that they are: on the examples made on the float network, whose gradients no
    quantizer can mask, or on those that a short PGD makes on the plan's own twin, whichever moves it further from what
    float says of the clean image.
    """
    run.progress("measured selection")
    contest = _Contest(run, _Judge.of(run))
    first, *others = entries
    tried = variants(run.options)
    scores = {variant: contest.enter(first, variant) for variant in _suited(first, tried)}
    for entry in others:
        for variant in _carried(entry, tried, scores, run.options):
            contest.enter(entry, variant)
    return contest.best(), contest.account()


def compare(run: Run, other: Run, name: str, plan: Plan) -> tuple[Applied, EvaluatedPlan]:
    """Measure one plan more as `select` does for ``run``: one for a network of ``other`` that computes the same."""
    contest = _Contest(other, _Judge.of(run))
    contest.enter(Entry(name, plan), Variant(plan.rounding, plan.bias_correction))
    return contest.best(), contest.account()[0]


def _carried(entry: Entry, tried: list[Variant], scores: Mapping[Variant, float], options: Options) -> list[Variant]:
    """The best of the first plan's variants for another one, and the best of those that normal effort tries."""
    lesser = variants(replace(options, effort="normal")) if options.effort == "max" else tried
    kept = (_suited(entry, tried), _suited(entry, [variant for variant in tried if variant in lesser]))
    best = [min(some, key=lambda variant: scores.get(variant, float("inf"))) for some in kept if some]
    return list(dict.fromkeys(best))


def _suited(entry: Entry, tried: list[Variant]) -> list[Variant]:
    """Those of ``tried`` that the plan is measured with; all where GPTQ is not among them."""
    return [variant for variant in tried if variant.rounding != "nearest"] or tried if entry.gptq else tried


class _Contest:
    """The plans measured so far."""

    def __init__(self, run: Run, judge: _Judge) -> None:
        self._run, self._judge = run, judge
        self._rows: list[EvaluatedPlan] = []
        self._best: tuple[float, Applied] | None = None

    def enter(self, entry: Entry, variant: Variant) -> float:
        """Measure a plan in a variant; returns its divergence."""
        run = self._run
        plan = entry.plan.with_changes(rounding=variant.rounding, bias_correction=variant.bias_correction)
        applied = run.quantizer.apply(plan)
        found = self._judge(TwinClassifier(applied.graph, run.normalisation, run.prepared.batch))
        self._rows.append(_row(run, f"{entry.name}, {variant.label}", applied, found))
        if self._best is None or sum(found) < self._best[0]:
            self._best = sum(found), applied
        return sum(found)

    def best(self) -> Applied:
        """The plan of lowest divergence, the first of equals."""
        assert self._best is not None
        return self._best[1]

    def account(self) -> list[EvaluatedPlan]:
        """All that were measured, in order."""
        chosen = self.best().plan.digest
        return [row.model_copy(update={"chosen": row.digest == chosen}) for row in self._rows]


@final
@dataclass(frozen=True, eq=False)
class _Judge:
    """The select images: all of them clean, and those that float withstands an attack on, as float's attack left them.

    ``labels`` and ``seed`` are for the attack on the plan's own twin; ``share`` is the part of all images withstood.
    """

    run: Run
    clean: Probe
    held: Probe | None
    transferred: Probe | None
    labels: Tensor
    share: float

    @staticmethod
    def of(run: Run) -> _Judge:
        assert run.data is not None
        images, adversarial = probe_images(run, "select")
        clean = Probe.of(run.float_twin, images)
        labels = torch.from_numpy(run.data.select.labels[: len(images)])
        if adversarial is None:
            return _Judge(run, clean, None, None, labels, 0.0)
        kept = withstood(run, "select")
        held = Probe(images[kept], clean.reference[kept])
        share = float(kept.double().mean())
        return _Judge(run, clean, held, Probe(adversarial[kept], held.reference), labels[kept], share)

    def __call__(self, twin: TwinClassifier) -> list[float]:
        """The divergence on clean images and, in a robust run, the share's on attacked ones."""
        found = [self.clean.divergence(twin)]
        if self.held is None or self.transferred is None:
            return found
        if not len(self.labels):
            return [*found, 0.0]
        return [*found, self.share * max(self.transferred.divergence(twin), self._attacked(twin, self.held))]

    def _attacked(self, twin: TwinClassifier, held: Probe) -> float:
        attack = PGD(steps=PROBE_STEPS, compact=False, batch_size=BATCH)
        made = attack(twin, held.images, self.labels, self.run.threat, seed=self.run.seed("select"))
        return Probe(made.adversarial, held.reference).divergence(twin)


def _row(run: Run, name: str, applied: Applied, divergences: list[float]) -> EvaluatedPlan:
    return EvaluatedPlan(
        name=name,
        digest=applied.plan.digest,
        code_bits=code_bits(applied.quantized.stored(run.prepared)),
        bias_correction=applied.plan.bias_correction,
        clean_divergence=divergences[0],
        adversarial_divergence=divergences[1] if len(divergences) > 1 else None,
        chosen=False,
    )
