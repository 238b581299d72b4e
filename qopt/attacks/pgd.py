"""Projected gradient descent (Madry et al. 2018), in linf and l2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import Ascent, LossName, ascend, check_options, check_positive
from qopt.attacks.score import BATCH_SIZE
from qopt.errors import UsageError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class PGD:
    """Steps along the sign of the gradient (linf) or the gradient over its norm (l2), kept in the ball and the box.

    Attributes:
        steps: gradient steps of each run.
        step: their length in the norm of the threat model; None for a quarter of eps.
        restarts: runs from different random starts; an image is fooled if one of them fools it.
        loss: cross_entropy, margin or dlr.
        random_start: start at a random point of the ball; otherwise at the clean image (then restarts must be 1).
        compact: fooled images leave the batch at once, just across the boundary. Same accuracy, less time. Take False
            for examples that are to fool *another* model, and for mean distortions as the literature gives them.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range, or several restarts would all start at the clean image.
    """

    steps: int = 20
    step: float | None = None
    restarts: int = 1
    loss: LossName = "cross_entropy"
    random_start: bool = True
    compact: bool = True
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("PGD", self.loss, steps=self.steps, restarts=self.restarts, batch_size=self.batch_size)
        check_positive("PGD", step=self.step)
        if self.restarts > 1 and not self.random_start:
            raise UsageError("restarts from the clean image repeat each other", where="PGD", fix="use random_start")

    @property
    def name(self) -> str:
        """For example ``PGD-20``, ``PGD-50x5 margin``: steps, restarts where several, loss where not cross-entropy."""
        runs = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"PGD-{self.steps}{runs}" + ("" if self.loss == "cross_entropy" else f" {self.loss}")

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; the random starts depend on ``seed`` and ``indices`` only.

        With ``targets`` (n,), classes, the prediction is to become those (`ascend`).
        """
        options = Ascent(
            steps=self.steps,
            step=threat.eps / 4 if self.step is None else self.step,
            loss=self.loss,
            start="ball" if self.random_start else "clean",
            restarts=self.restarts,
            compact=self.compact,
            batch_size=self.batch_size,
        )
        return ascend(model, images, labels, threat, options, seed=seed, indices=indices, targets=targets)
