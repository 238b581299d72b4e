"""The verdict on an emitted file: clean accuracy, attacks, transfers, and whether the attacks can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from qopt.attacks import (
    FGSM,
    PGD,
    Classifier,
    Finding,
    accuracy_vector,
    dead_gradients,
    transfer_stronger,
    unbounded_attack,
    unbounded_correct,
    worst_case,
    zero_gradients,
)
from qopt.measure.network import ArtefactClassifier, TwinClassifier
from qopt.threat import ThreatModel

Attack = FGSM | PGD
BATCH = 100
"""Images whose gradients are computed at once: small enough for 2 GB on CIFAR networks, and no slower."""

CHECKED = 200
"""Images on which the unbounded attack is tried; the zero-gradient rule looks at all."""


@final
@dataclass(frozen=True, eq=False)
class Setting:
    """What every network is attacked with: the same images, threat model, attacks and seed.

    Attributes:
        images: float32 (n, ...) in [0, 1].
        labels: int64 (n,).
        threat: the declared threat model.
        seed: of the run.
        attacks: the preset.
    """

    images: Tensor
    labels: Tensor
    threat: ThreatModel
    seed: int
    attacks: tuple[Attack, ...] = (FGSM(batch_size=BATCH), PGD(batch_size=BATCH))


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """Which images one network classifies right: bool (n,) each, in the order of the setting's images.

    Attributes:
        clean: on the images as they are.
        attacked: by the name of the attack; ``transfer`` holds examples made on the float network.
    """

    clean: Tensor
    attacked: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def robust(self) -> Tensor:
        """Per-example worst over the clean image and all attacks of the threat model: the one number's vector."""
        return worst_case([self.clean, *self.attacked.values()])


def attack_float(
    twin: TwinClassifier, artefact: ArtefactClassifier, setting: Setting
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores of the float network, and its adversarial images by attack, made to transfer (every step is taken)."""
    adversarial: dict[str, Tensor] = {}
    attacked: dict[str, Tensor] = {}
    for attack in setting.attacks:
        full = replace(attack, compact=False) if isinstance(attack, PGD) else attack
        result = full(twin, setting.images, setting.labels, setting.threat, seed=setting.seed)
        adversarial[attack.name] = result.adversarial
        attacked[attack.name] = accuracy_vector(artefact, result.adversarial, setting.labels)
    return Scores(accuracy_vector(artefact, setting.images, setting.labels), attacked), adversarial


def attack_artefact(
    twin: TwinClassifier, artefact: ArtefactClassifier, setting: Setting, transferred: Mapping[str, Tensor]
) -> Scores:
    """Scores of an emitted file: attacked through its twin, judged in ONNX Runtime, float's examples included."""
    attacked = {attack.name: white_box(attack, twin, artefact, setting) for attack in setting.attacks}
    if transferred:
        scored = [accuracy_vector(artefact, images, setting.labels) for images in transferred.values()]
        attacked["transfer"] = worst_case(scored)
    return Scores(accuracy_vector(artefact, setting.images, setting.labels), attacked)


def white_box(attack: Attack, twin: Classifier, artefact: Classifier, setting: Setting) -> Tensor:
    """Bool (n,): which images the file still gets right when attacked through its twin.

    Twin and file differ by rounding, which opens two holes that would flatter the file: an example that stops just
    across the twin's boundary need not fool the file, and an image that the twin alone gets wrong would not be attacked
    at all. Such images are attacked again with all steps taken: first for the last example that fools the twin, then
    for the one at which the steps end.
    """
    images, labels, threat, seed = setting.images, setting.labels, setting.threat, setting.seed
    result = attack(twin, images, labels, threat, seed=seed)
    correct = accuracy_vector(artefact, result.adversarial, labels)
    if isinstance(attack, PGD):
        attack = replace(attack, compact=False)
        rows = torch.nonzero(correct & result.fooled).flatten()
        if len(rows):
            deeper = attack(twin, images[rows], labels[rows], threat, seed=seed, indices=rows)
            correct[rows] = accuracy_vector(artefact, deeper.adversarial, labels[rows])
    for label in torch.unique(labels[correct & result.fooled]).tolist():
        rows = torch.nonzero(correct & result.fooled & (labels == label)).flatten()
        ended = attack(_Ahead(twin, label), images[rows], labels[rows], threat, seed=seed, indices=rows)
        correct[rows] = accuracy_vector(artefact, ended.adversarial, labels[rows])
    return correct


@final
@dataclass(frozen=True, eq=False)
class _Ahead:
    """A classifier that always answers ``label``, with unchanged gradients: an attack on it takes all its steps."""

    model: Classifier
    label: int

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images).double()
        lead = torch.zeros_like(logits)
        lead[:, self.label] = (logits.amax(1) - logits[:, self.label] + 1.0).detach()
        return logits + lead


def masking_findings(twin: TwinClassifier, scores: Scores, setting: Setting) -> list[Finding]:
    """The rules on zero gradients, the unbounded attack and transfers, for a network attacked through ``twin``."""
    few = min(CHECKED, len(setting.images))
    images, labels = setting.images[:few], setting.labels[:few]
    findings = [
        zero_gradients(dead_gradients(twin, setting.images, setting.labels, BATCH)),
        unbounded_attack(unbounded_correct(twin, images, labels, seed=setting.seed, batch_size=BATCH)),
    ]
    if "transfer" in scores.attacked:
        white = worst_case([v for name, v in scores.attacked.items() if name != "transfer"])
        findings.append(transfer_stronger(white, scores.attacked["transfer"]))
    return findings
