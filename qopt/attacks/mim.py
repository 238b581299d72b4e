"""MI-FGSM, the momentum iterative method (Dong et al. 2018): what it finds transfers better to other models."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import final

from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import Ascent, LossName, ascend, check_options, check_positive
from qopt.attacks.score import BATCH_SIZE
from qopt.errors import UsageError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class MIM:
    """Steps along the sum of the gradients so far, each over its l1 norm: ``g <- decay * g + grad / |grad|_1``.

    The step is the sign of g in linf and g over its norm in l2, from the clean image.

    Attributes:
        steps: gradient steps.
        step: their length in the norm of the threat model; None for a quarter of eps.
        decay: share of the sum that the next step keeps, 0 or larger; 0 is BIM, 1 forgets nothing.
        loss: cross_entropy, margin or dlr.
        compact: as in `PGD`; take False for examples that are to transfer.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    steps: int = 20
    step: float | None = None
    decay: float = 1.0
    loss: LossName = "cross_entropy"
    compact: bool = True
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("MIM", self.loss, steps=self.steps, batch_size=self.batch_size)
        check_positive("MIM", step=self.step)
        if not (isfinite(self.decay) and self.decay >= 0):
            raise UsageError("decay must be a finite number, 0 or larger", where="MIM", got=repr(self.decay))

    @property
    def name(self) -> str:
        """For example ``MIM-20``, ``MIM-20 margin``: steps, and the loss where it is not cross-entropy."""
        return f"MIM-{self.steps}" + ("" if self.loss == "cross_entropy" else f" {self.loss}")

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
            decay=self.decay,
            compact=self.compact,
            batch_size=self.batch_size,
        )
        return ascend(model, images, labels, threat, options, seed=seed, indices=indices, targets=targets)
