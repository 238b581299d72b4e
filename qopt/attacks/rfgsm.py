"""R+FGSM (Tramer et al. 2018, as Lin et al. 2019 use it): a random step of eps / 2, then one along the gradient."""

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
class RFGSM:
    """``x' = x + eps / 2 * sign(N(0, I))``, then FGSM from there with the other half of eps; in l2 both steps are
    vectors of length eps / 2. The random step leads around the bend that FGSM training puts at the clean image.

    Raises:
        UsageError: the loss is unknown or the batch size is below 1.
    """

    loss: LossName = "cross_entropy"
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("RFGSM", self.loss, batch_size=self.batch_size)

    @property
    def name(self) -> str:
        """``R+FGSM``, with the loss where it is not cross-entropy."""
        return "R+FGSM" if self.loss == "cross_entropy" else f"R+FGSM {self.loss}"

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; the random steps depend on ``seed`` and ``indices`` only."""
        options = Ascent(
            steps=1, step=threat.eps / 2, loss=self.loss, start="halfway", compact=False, batch_size=self.batch_size
        )
        return ascend(model, images, labels, threat, options, seed=seed, indices=indices)
