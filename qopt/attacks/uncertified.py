"""Images that a certificate covers need no attack: nothing in the ball can fool the model on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import Attack, AttackResult, Classifier
from qopt.attacks.gradient import check_indices
from qopt.attacks.score import accuracy_vector
from qopt.errors import DataError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True, eq=False)
class Uncertified:
    """``attack`` on the images without a certificate; the others leave before it starts.

    Attributes:
        attack: any attack.
        certified: bool (m,), by the number of the image: whether the model is proven right on the whole ball of the
            threat model that the attack is called with, for instance by `qopt.certificates.certificate.certify`.
    """

    attack: Attack
    certified: Tensor

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
        """Attack ``images`` (n, ...), float32 in [0, 1].

        Raises:
            DataError: an image's number has no entry in ``certified``; images, labels or indices do not fit.
        """
        numbers = check_indices(indices, len(images))
        if self.certified.dtype != torch.bool or int(numbers.max()) >= len(self.certified):
            raise DataError(
                "certificates need one boolean per image", expected=f"{int(numbers.max()) + 1} or more",
                got=f"{self.certified.dtype} of shape {tuple(self.certified.shape)}",
            )  # fmt: skip
        adversarial = images.detach().clone()
        fooled = ~accuracy_vector(model, images, labels)
        rows = (~self.certified[numbers.to(self.certified.device)]).nonzero().flatten()
        if len(rows):
            result = self.attack(model, images[rows], labels[rows], threat, seed=seed, indices=numbers[rows])
            adversarial[rows], fooled[rows] = result.adversarial, result.fooled
        return AttackResult(adversarial, fooled)
