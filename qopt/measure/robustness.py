"""The verdict on an emitted file: clean accuracy, attacks, transfers, and whether the attacks can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast, final

import torch
from torch import Tensor

import qopt.attacks as suite
from qopt.attacks import (
    BIM,
    FGSM,
    MIM,
    PGD,
    RFGSM,
    AttackResult,
    Classifier,
    Finding,
    accuracy_vector,
    dead_gradients,
    predict,
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

ASCENTS = (FGSM, RFGSM, BIM, MIM, PGD)
"""Attacks that take their steps whatever the loss says: they go on where the model is made to look unbeaten."""

DEEPER = (1.0, 4.0)
"""Other attacks are run again with the label ahead by this times the lead that file and twin differ by."""


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
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores of an emitted file: attacked through its twin, judged in ONNX Runtime, float's examples included.

    With them its adversarial images by attack, of which those that fool it may have stopped where they first did.
    """
    found = {attack.name: reach(attack, twin, artefact, setting) for attack in setting.attacks}
    attacked = {name: result.correct for name, result in found.items()}
    if transferred:
        scored = [accuracy_vector(artefact, images, setting.labels) for images in transferred.values()]
        attacked["transfer"] = worst_case(scored)
    scores = Scores(accuracy_vector(artefact, setting.images, setting.labels), attacked)
    return scores, {name: result.adversarial for name, result in found.items()}


def white_box(attack: Attack, twin: Classifier, artefact: Classifier, setting: Setting) -> Tensor:
    """Bool (n,): which images the file still gets right when attacked through its twin, see `reach`."""
    return reach(attack, twin, artefact, setting).correct


def reach(
    attack: suite.Attack,
    twin: Classifier,
    artefact: Classifier,
    setting: Setting,
    indices: Tensor | None = None,
) -> AttackResult:
    """What ``attack`` on the twin does to the file; the setting's images have the numbers ``indices``, else 0..n-1.

    Twin and file differ by rounding, which opens two holes that would flatter the file: an example that stops just
    across the twin's boundary need not fool the file, and an image that the twin alone gets wrong would not be attacked
    at all. Such images are attacked again, by steps with all steps taken: first for the last example that fools the
    twin, then for the one at which the steps end; by other attacks with the twin's boundary moved to where the file's
    must be. The rounds for an image do not depend on the others.
    """
    numbers = torch.arange(len(setting.images)) if indices is None else indices
    made = attack(twin, setting.images, setting.labels, setting.threat, seed=setting.seed, indices=numbers)
    found = _Found(setting, artefact, numbers, made.adversarial, made.fooled)
    if getattr(attack, "compact", False):
        attack = _whole(attack)
        found.again(attack, twin, found.missed())
    if isinstance(attack, ASCENTS):
        for label in torch.unique(setting.labels[found.missed()]).tolist():
            found.again(attack, _Ahead(twin, label), _of(found.missed(), setting.labels == label))
    else:
        _move_boundary(attack, twin, found)
    return AttackResult(found.adversarial, ~found.correct)


def _whole(attack: suite.Attack) -> suite.Attack:
    """The same, with every step taken."""
    return cast("suite.Attack", replace(cast("Any", attack), compact=False))


def _of(rows: Tensor, mask: Tensor) -> Tensor:
    return rows[mask[rows]]


@final
class _Found:
    """What is known of every image: its example, and whether the file is right about it."""

    def __init__(
        self, setting: Setting, artefact: Classifier, numbers: Tensor, adversarial: Tensor, fooled: Tensor
    ) -> None:
        self.setting, self.artefact, self.numbers = setting, artefact, numbers
        self.adversarial, self._fooled = adversarial, fooled
        self.correct = accuracy_vector(artefact, adversarial, setting.labels)

    def missed(self) -> Tensor:
        """The images whose first example fools the twin only, int64 (m,)."""
        return torch.nonzero(self.correct & self._fooled).flatten()

    def again(self, attack: suite.Attack, model: Classifier, rows: Tensor) -> None:
        """Attack ``rows`` (m,) once more, and keep what fools the file."""
        if not len(rows):
            return
        images, labels = self.setting.images[rows], self.setting.labels[rows]
        threat, seed = self.setting.threat, self.setting.seed
        made = attack(model, images, labels, threat, seed=seed, indices=self.numbers[rows]).adversarial
        right = accuracy_vector(self.artefact, made, labels)
        self.correct[rows] = right
        self.adversarial[rows[~right]] = made[~right]


def _move_boundary(attack: suite.Attack, twin: Classifier, found: _Found) -> None:
    """Attack what was missed with the twin's label ahead, by a power of two so that few runs serve all images."""
    rows, labels = found.missed(), found.setting.labels
    if not len(rows):
        return
    lead = torch.zeros(len(labels), dtype=torch.float64)
    lead[rows] = _lead(twin, found, rows) - _lead(found.artefact, found, rows)
    lead = torch.exp2(torch.ceil(torch.log2(lead.clamp_min(1e-6))))
    for factor in DEEPER:
        for label, ahead in sorted({(int(labels[row]), float(lead[row])) for row in found.missed()}):
            same = (labels == label) & (lead == ahead)
            found.again(attack, _Behind(twin, label, factor * ahead), _of(found.missed(), same))


def _lead(model: Classifier, found: _Found, rows: Tensor) -> Tensor:
    """How far the best wrong class leads the label on the examples of ``rows`` (m,): float64 (m,)."""
    logits = predict(model, found.adversarial[rows]).double()
    labels = found.setting.labels[rows][:, None]
    own = logits.gather(1, labels).squeeze(1)
    return logits.scatter(1, labels, -torch.inf).amax(1) - own


@final
@dataclass(frozen=True, eq=False)
class _Behind:
    """A classifier whose other classes must lead ``label`` by ``lead`` more."""

    model: Classifier
    label: int
    lead: float

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        ahead = torch.zeros_like(logits)
        ahead[:, self.label] = self.lead
        return logits + ahead


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


def loss_gradients(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients, like ``images`` (n, ...), of the cross-entropy with ``labels`` (n,)."""
    parts = zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True)
    return torch.cat([suite.input_gradient(model, *part, "cross_entropy") for part in parts])


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
