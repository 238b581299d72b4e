"""The last word on a plan: a short measured selection on held-out images, nothing assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, final

import torch

from qopt.attacks import PGD
from qopt.config import Options
from qopt.job.run import PROBE_STEPS, Run
from qopt.job.space import probe_images
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

    rounding: Literal["nearest", "gptq"]
    bias_correction: bool

    @property
    def label(self) -> str:
        """Words for the report."""
        return f"{self.rounding}{', bias correction' if self.bias_correction else ''}"


def variants(options: Options) -> list[Variant]:
    """What the options leave open, cheapest first."""
    tried: dict[str, list[Variant]] = {"fast": [Variant("nearest", False), Variant("nearest", True)]}
    tried["normal"] = [*tried["fast"], Variant("gptq", True)]
    tried["max"] = [*tried["normal"], Variant("gptq", False)]
    roundings: tuple[Literal["nearest", "gptq"], ...] = ("nearest", "gptq")
    every = [Variant(rounding, correct) for rounding, correct in product(roundings, (False, True))]
    asked = every if options.rounding != "auto" else tried[options.effort]
    kept = [v for v in asked if options.rounding in ("auto", v.rounding)]
    return [v for v in kept if options.bias_correction in ("auto", "on" if v.bias_correction else "off")]


def select(run: Run, plans: Sequence[tuple[str, Plan]]) -> tuple[Applied, list[EvaluatedPlan]]:
    """Make every plan real in every variant and keep what stays closest to float on the select images.

    Closest is the mean KL divergence from float on clean images, plus, in a robust run, the one on adversarial images:
    those made on the float network, whose gradients no quantizer can mask, or those that a short PGD makes on the
    plan's own twin, whichever moves it further from what float says of the clean image. Without data the first plan
    is applied as it is.
    """
    if run.data is None:
        run.left_out.append("activation quantization, bias correction and measured selection: they need --data")
        return run.quantizer.apply(plans[0][1]), []
    run.progress("measured selection")
    clean, adversarial = probe_images(run, "select")
    probe = Probe.of(run.float_twin, clean)
    moved = None if adversarial is None else Probe(adversarial, probe.reference)
    best: Applied | None = None
    rows: list[EvaluatedPlan] = []
    lowest = float("inf")
    for (name, plan), variant in product(plans, variants(run.options)):
        applied = run.quantizer.apply(
            plan.with_changes(rounding=variant.rounding, bias_correction=variant.bias_correction)
        )
        twin = _twin(run, applied)
        found = [probe.divergence(twin)]
        if moved is not None:
            found.append(max(moved.divergence(twin), _attacked(run, twin, probe)))
        rows.append(_row(run, f"{name}, {variant.label}", applied, found))
        if sum(found) < lowest:
            best, lowest = applied, sum(found)
    assert best is not None
    return best, [row.model_copy(update={"chosen": row.digest == best.plan.digest}) for row in rows]


def _attacked(run: Run, twin: TwinClassifier, probe: Probe) -> float:
    """Divergence from what float says of the clean images, on examples that a short PGD makes of them on ``twin``."""
    assert run.data is not None
    labels = torch.from_numpy(run.data.select.labels[: len(probe.images)])
    attack = PGD(steps=PROBE_STEPS, compact=False, batch_size=BATCH)
    made = attack(twin, probe.images, labels, run.threat, seed=run.seed("select"))
    return Probe(made.adversarial, probe.reference).divergence(twin)


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


def _twin(run: Run, applied: Applied) -> TwinClassifier:
    return TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
