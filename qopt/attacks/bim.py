"""The basic iterative method (Kurakin et al. 2017): FGSM in small steps from the clean image."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import final

from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import Ascent, LossName, ascend, check_options, check_positive
from qopt.attacks.score import BATCH_SIZE
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class BIM:
    """Steps along the sign of the gradient (linf) or the gradient over its norm (l2): PGD without chance.

    Attributes:
        steps: gradient steps.
        step: their length in the norm of the threat model; None for a quarter of eps.
        loss: cross_entropy, margin or dlr.
        compact: as in `PGD`.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    steps: int = 20
    step: float | None = None
    loss: LossName = "cross_entropy"
    compact: bool = True
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("BIM", self.loss, steps=self.steps, batch_size=self.batch_size)
        check_positive("BIM", step=self.step)

    @staticmethod
    def kurakin(eps: float) -> BIM:
        """The paper's iterations for an ``eps`` in [0, 1]: ``min(eps + 4, 1.25 eps)`` in units of 1/255, rounded down,
        at least one, of 1/255 each.
        """
        pixels = round(255 * eps, 6)  # 8/255 is to be 8, not 7.999..
        return BIM(steps=max(1, floor(min(pixels + 4, 1.25 * pixels))), step=1 / 255)

    @property
    def name(self) -> str:
        """For example ``BIM-20``, ``BIM-20 margin``: steps, and the loss where it is not cross-entropy."""
        return f"BIM-{self.steps}" + ("" if self.loss == "cross_entropy" else f" {self.loss}")

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
        options = Ascent(
            steps=self.steps,
            step=threat.eps / 4 if self.step is None else self.step,
            loss=self.loss,
            compact=self.compact,
            batch_size=self.batch_size,
        )
        return ascend(model, images, labels, threat, options, seed=seed, indices=indices, targets=targets)
