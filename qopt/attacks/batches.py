"""Around the idea of an attack: wrong images are left alone, right ones held in batches, and the end is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import check_indices
from qopt.attacks.score import accuracy_vector, check_labels, predict

HELD = 4
"""Batches whose images are worked on together: as images leave, the rest still fills whole batches."""


@final
@dataclass(frozen=True, eq=False)
class Held:
    """Images that the model gets right, `HELD` batches of them at most.

    Attributes:
        images: clean images (n, ...), float32 in [0, 1], not to be written to.
        labels: their classes, int64 (n,).
        numbers: their numbers in the data set, int64 (n,); chance depends on nothing else and the seed.
        logits: what the model says of them, (n, classes).
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    logits: Tensor

    def rows(self, kept: Tensor) -> Held:
        """The images that ``kept``, int64 (m,) or bool (n,), selects."""
        return Held(self.images[kept], self.labels[kept], self.numbers[kept], self.logits[kept])


def attack_right(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    indices: Tensor | None,
    batch_size: int,
    attack: Callable[[Held], Tensor],
) -> AttackResult:
    """``attack`` on the images (n, ...) that the model gets right; it returns adversarial images like its own.

    Images that the model gets wrong are returned as they are. ``fooled`` is what `accuracy_vector` says of the returned
    images, whatever happened on the way.

    Raises:
        DataError: images, labels or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    logits = predict(model, images, batch_size)
    labels = check_labels(labels, len(images), logits.shape[1])
    numbers = check_indices(indices, len(images))
    right = (logits.argmax(1) == labels).nonzero().flatten()
    with torch.inference_mode(False):  # under a caller's inference mode there would be no gradients, silently
        adversarial = images.detach().clone()
        whole = Held(adversarial, labels.clone(), numbers.to(labels.device), logits)
        for rows in torch.split(right, HELD * batch_size) if len(right) else ():
            adversarial[rows] = attack(whole.rows(rows))
    return AttackResult(adversarial, ~accuracy_vector(model, adversarial, labels, batch_size))


def likely_classes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The ``count`` most likely other classes, at most classes - 1, most likely first: int64 (n, count)."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def slices(count: int, batch_size: int) -> Iterator[slice]:
    """The batches of ``count`` images."""
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))


def answers(model: Classifier, images: Tensor, batch_size: int) -> Tensor:
    """Logits (n, classes) of ``images`` (n, ...), n >= 1, without gradients; nothing is checked, unlike `predict`."""
    with torch.no_grad():
        found = [model(images[part]) for part in slices(len(images), batch_size)]
    return found[0] if len(found) == 1 else torch.cat(found)
