"""The fast gradient sign method (Goodfellow et al. 2015): one step of length eps from the clean image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import Ascent, LossName, ascend, check_options
from qopt.attacks.score import BATCH_SIZE
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class FGSM:
    """One step to the surface of the ball: the sign of the gradient for linf, the gradient over its norm for l2.

    Raises:
        UsageError: the loss is unknown or the batch size is below 1.
    """

    loss: LossName = "cross_entropy"
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("FGSM", self.loss, batch_size=self.batch_size)

    @property
    def name(self) -> str:
        """``FGSM``, with the loss where it is not cross-entropy."""
        return "FGSM" if self.loss == "cross_entropy" else f"FGSM {self.loss}"

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1]; there is no chance in it, so the seed changes nothing.

        With ``targets`` (n,), classes, the prediction is to become those (`ascend`).
        """
        options = Ascent(steps=1, step=threat.eps, loss=self.loss, batch_size=self.batch_size)
        return ascend(model, images, labels, threat, options, seed=seed, indices=indices, targets=targets)
