"""Signs that a model's robustness is not its own but its gradients' fault: the verdict, and what rules are measured by.

The rules are pure functions of what was measured, in `masking_rules`. A model with any rule triggered is masked: the
attacks by gradient did not work on it, so what they report is no robustness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qopt.attacks.attack import Attack, Classifier
from qopt.attacks.gradient import input_gradient, unusable
from qopt.attacks.masking_rules import (
    DEAD_SHARE,
    Finding,
    accuracy_rises,
    iterative_weaker,
    losses_disagree,
    noise_as_strong,
    not_converged,
    queries_nearer,
    queries_stronger,
    transfer_stronger,
    unbounded_attack,
    zero_gradients,
)
from qopt.attacks.pgd import PGD
from qopt.attacks.score import BATCH_SIZE, accuracy_vector, check_images, check_labels, predict, worst_case
from qopt.errors import DataError
from qopt.threat import ThreatModel

__all__ = [
    "DEAD_SHARE",
    "Finding",
    "Verdict",
    "accuracy_rises",
    "dead_gradients",
    "iterative_weaker",
    "losses_disagree",
    "noise_as_strong",
    "not_converged",
    "queries_nearer",
    "queries_stronger",
    "transfer_stronger",
    "transferred_correct",
    "unbounded_attack",
    "unbounded_correct",
    "verdict",
    "zero_gradients",
]

Verdict = Literal["none", "masked"]


def verdict(findings: Sequence[Finding]) -> Verdict:
    """``masked`` where any rule was triggered that is more than a warning.

    Raises:
        DataError: there are no findings but warnings; nothing checked is not the same as nothing found.
    """
    rules = [finding for finding in findings if not finding.warning]
    if not rules:
        raise DataError("no masking rule was measured", fix="measure at least one before giving a verdict")
    return "masked" if any(finding.triggered for finding in rules) else "none"


def dead_gradients(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Bool (n,): whether the input gradient of the log-odds at the clean image is all zero or not finite.

    The log-odds have the direction of cross-entropy without its saturation: a confident model is not a masked one.

    Raises:
        DataError: the images or labels do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    check_images(images)
    labels = check_labels(labels, len(images), predict(model, images[:1]).shape[1])
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    return torch.cat([unusable(input_gradient(model, *batch, "cross_entropy")) for batch in batches])


def unbounded_correct(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    indices: Tensor | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Bool (n,): whether an image is still classified right after PGD with linf eps = 1 from the clean image and from
    one random image. (More random starts would be a search without gradients.)

    Raises:
        DataError: the images, labels or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    anywhere = ThreatModel("linf", 1.0)
    attacks = (
        PGD(steps=40, step=0.05, random_start=False, batch_size=batch_size),
        PGD(steps=20, batch_size=batch_size),
    )
    left = [a(model, images, labels, anywhere, seed=seed, indices=indices).correct for a in attacks]
    return worst_case(left)


def transferred_correct(
    source: Classifier,
    target: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    indices: Tensor | None = None,
    attack: Attack | None = None,
) -> Tensor:
    """Bool (n,): whether ``target`` is right about the examples that ``attack`` makes on ``source``.

    The default attack is PGD that takes all its steps: examples that stop at the source's boundary transfer badly.
    Images that the source gets wrong are passed on as they are.

    Raises:
        DataError: the images, labels or indices do not fit.
        ModelError: an output is no finite matrix of logits.
    """
    made = (attack or PGD(compact=False))(source, images, labels, threat, seed=seed, indices=indices)
    return accuracy_vector(target, made.adversarial, labels)
