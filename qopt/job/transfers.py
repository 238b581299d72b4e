"""The networks of the table against each other: whose examples fool whom, and how alike their gradients are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qopt.attacks import PGD, accuracy_vector, gradient_cosines, transfer_matrix, transfer_predictions
from qopt.job.artefact import Artefact
from qopt.measure.network import ArtefactClassifier
from qopt.measure.robustness import BATCH, Setting, loss_gradients
from qopt.report.model import Transfers

ATTACK = PGD(batch_size=BATCH)
"""Whose examples are tried on the other networks: the strongest of those that every network is attacked with."""


@final
@dataclass(frozen=True, eq=False)
class Attacked:
    """What is kept of a network that was attacked: its twin and the bytes of its file are not.

    Attributes:
        classifier: its file.
        examples: what `ATTACK` made of the first images on its twin, every step taken: (n, ...), like those.
        gradients: of its twin's loss on the same images, clean: (n, ...).
    """

    classifier: ArtefactClassifier
    examples: Tensor
    gradients: Tensor

    @staticmethod
    def of(artefact: Artefact, examples: Tensor, setting: Setting) -> Attacked:
        """With ``examples`` of which one batch is kept."""
        images, labels = setting.images[:BATCH], setting.labels[:BATCH]
        return Attacked(artefact.classifier, examples[:BATCH], loss_gradients(artefact.twin, images, labels))


def attacked(artefact: Artefact, made: Mapping[str, Tensor], setting: Setting) -> Attacked:
    """The network with the examples of one batch; ``made`` are all by attack, as the validation left them.

    Those that fool the file stopped at once, just across its boundary, which tells nothing of other networks: only
    they are made again.
    """
    examples = made[ATTACK.name][:BATCH].clone()
    images, labels = setting.images[:BATCH], setting.labels[:BATCH]
    right = accuracy_vector(artefact.classifier, torch.cat([images, examples]), torch.cat([labels, labels]))
    rows = torch.nonzero(right[: len(images)] & ~right[len(images) :]).flatten()
    if len(rows):
        full = replace(ATTACK, compact=False)
        again = full(artefact.twin, images[rows], labels[rows], setting.threat, seed=setting.seed, indices=rows)
        examples[rows] = again.adversarial
    return Attacked.of(artefact, examples, setting)


def transfers(networks: Mapping[str, Attacked], setting: Setting) -> Transfers | None:
    """Every network's examples on every network's file, and the gradients of their twins; None without attacks."""
    if not networks:
        return None
    images, labels = setting.images[:BATCH], setting.labels[:BATCH]
    files = [network.classifier for network in networks.values()]
    examples = [images, *(network.examples for network in networks.values())]
    wrong = 1 - transfer_matrix(transfer_predictions(examples, files), labels)
    cosines = gradient_cosines(torch.stack([network.gradients for network in networks.values()]))
    clean, *fooled = (100 * wrong).tolist()
    return Transfers(
        images=len(images), networks=list(networks), clean=_rounded(clean), fooled=[_rounded(row) for row in fooled],
        cosines=[_rounded(row) for row in cosines.tolist()],
    )  # fmt: skip


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]
