"""Whether the attacks on a file can be believed: the masking rules, with what the suite has measured already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.attacks import (
    CW,
    ZOO,
    Attack,
    AttackResult,
    Budget,
    Classifier,
    Finding,
    Known,
    checklist,
    queries_nearer,
    worst_case,
    worst_of,
)
from qopt.cache import digest_arrays
from qopt.job.attack_rows import Battery, Outcome, modes
from qopt.threat import ThreatModel


def masking_findings(battery: Battery, budget: Budget) -> list[Finding]:
    """What every rule finds on the file, whose twin has gradients; what the battery knows is not measured again.

    Raises:
        DataError: eps is 0.
    """
    field = battery.field
    known = _known(battery.outcomes, field.threat)
    key = {
        "file": field.subject.content, "images": digest_arrays(field.images.numpy(), field.labels.numpy()),
        "threat": [field.threat.norm, field.threat.eps], "seed": field.seed, "budget": repr(budget),
        "normalisation": repr(field.subject.artefact.normalisation), "known": _digest(known),
        "gradients": modes(field.subject, field.gradients),
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        first, *others = battery.models
        found = checklist(
            first, field.images, field.labels, field.threat, seed=field.seed, artefact=field.subject.artefact,
            known=known, budget=_under_all(budget, tuple(others)),
        )  # fmt: skip
        return {"findings": np.array(json.dumps([asdict(finding) for finding in found]))}

    stored = field.cache.arrays("masking", key, compute)["findings"]
    findings = [Finding(**finding) for finding in json.loads(str(stored))]
    return findings + _nearest(battery.outcomes)


def _known(outcomes: Iterable[Outcome], threat: ThreatModel) -> Known:
    """The results under the declared threat model; of two attacks of one name the first keeps it."""
    white: dict[str, Tensor] = {}
    queried: dict[str, Tensor] = {}
    transferred = []
    for outcome in outcomes:
        if outcome.entry.threat != threat:
            continue
        if outcome.source:
            transferred.append(outcome.correct)
        else:
            named = queried if outcome.access == "queries" else white
            name = outcome.entry.attack.name
            named[f"{name} ({outcome.entry.origin})" if name in named else name] = outcome.correct
    return Known(white, queried, worst_case(transferred) if transferred else None)


def _digest(known: Known) -> str:
    named: list[Mapping[str, Tensor]] = [known.white, known.queried]
    named += [{} if known.transferred is None else {"transferred": known.transferred}]
    names = np.array([f"{index} {name}" for index, part in enumerate(named) for name in part], dtype=np.str_)
    return digest_arrays(names, *(vector.numpy() for part in named for vector in part.values()))


def _nearest(outcomes: Iterable[Outcome]) -> list[Finding]:
    """The rule on ZOO and CW-L2, where both were run on all images."""
    found = {type(getattr(o.entry.attack, "attack", None)): o for o in outcomes if not o.source}
    if CW not in found or ZOO not in found:
        return []
    white, queried = found[CW], found[ZOO]
    return [queries_nearer(white.correct, queried.correct, white.l2, queried.l2)]


def _under_all(budget: Budget, others: tuple[Classifier, ...]) -> Budget:
    """The budget with attacks that take the worst over all ways that gradients may pass."""
    if not others:
        return budget
    one_step, iterative, other_loss, longer = (
        UnderAll(attack, others) for attack in (budget.one_step, budget.iterative, budget.other_loss, budget.longer)
    )
    return replace(budget, one_step=one_step, iterative=iterative, other_loss=other_loss, longer=longer)


@final
@dataclass(frozen=True)
class UnderAll:
    """An attack on a model, and where that fails on the same model with other gradients.

    Attributes:
        attack: the attack.
        others: the model with other gradients, in the order in which they are tried.
    """

    attack: Attack
    others: tuple[Classifier, ...]

    @property
    def name(self) -> str:
        """The name of the attack."""
        return self.attack.name

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1]."""
        numbers = torch.arange(len(images)) if indices is None else indices
        worst = self.attack(model, images, labels, threat, seed=seed, indices=numbers)
        for other in self.others:
            rows = worst.correct.nonzero().flatten()
            if len(rows):
                found = self.attack(other, images[rows], labels[rows], threat, seed=seed, indices=numbers[rows])
                whole = AttackResult(images.clone(), torch.zeros_like(worst.fooled))
                whole.adversarial[rows], whole.fooled[rows] = found.adversarial, found.fooled
                worst = worst_of([worst, whole])
        return worst
