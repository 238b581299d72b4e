"""Random noise as an attack: the baseline that any attack by gradients must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import draws, random_start
from qopt.attacks.gradient import aim, check_indices, check_options, check_positive
from qopt.attacks.score import BATCH_SIZE, predict
from qopt.seeds import derive
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class UniformNoise:
    """One point drawn uniformly from the ball, clipped to the box: in linf every pixel within +-eps on its own
    (*Random* of Lin et al. 2019), in l2 a point of the solid ball. No gradients are asked for.

    Raises:
        UsageError: the batch size is below 1.
    """

    batch_size: int = BATCH_SIZE

    name: ClassVar[str] = "uniform noise"

    def __post_init__(self) -> None:
        check_options("UniformNoise", "margin", batch_size=self.batch_size)

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; the noise depends on ``seed`` and ``indices`` only."""
        logits = predict(model, images, self.batch_size)
        goal = aim(labels, None, logits)
        numbers = check_indices(indices, len(images))
        noisy = random_start(images, threat, seed=derive(seed, "uniform noise"), indices=numbers, restart=0)
        kept = torch.where(_columns(goal.reached(logits), images), images, noisy)
        return AttackResult(kept, goal.reached(predict(model, kept, self.batch_size)))


@final
@dataclass(frozen=True)
class GaussianNoise:
    """Normal noise of standard deviation ``sigma`` on every pixel, clipped to the box and to nothing else.

    Clipped to a ball as well it would be another distribution than the one that papers report, and its linf distance
    hardly ever lies in one; so it is a `MinimumAttack`, without a threat model, and `keep_within` says what of it
    counts for one. No gradients are asked for.

    Attributes:
        sigma: in pixel units, larger than 0; 8/255 for CIFAR-10 and 0.3 for MNIST in the papers' tables.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    sigma: float = 8 / 255
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("GaussianNoise", "margin", batch_size=self.batch_size)
        check_positive("GaussianNoise", sigma=self.sigma)

    @property
    def name(self) -> str:
        """For example ``Gaussian noise 0.0314``."""
        return f"Gaussian noise {self.sigma:.3g}"

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int, indices: Tensor | None = None
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1]; the noise depends on ``seed`` and ``indices`` only.

        An image that its noise does not fool comes back as it is; ``correct`` is the accuracy under noise, less the
        images that were wrong without it.
        """
        logits = predict(model, images, self.batch_size)
        goal = aim(labels, None, logits)
        numbers = check_indices(indices, len(images))
        noise = torch.empty(images.shape, dtype=images.dtype)
        for row, generator in draws(noise, seed, "Gaussian noise", numbers):
            row.normal_(generator=generator)
        noisy = (images + self.sigma * noise.to(images.device)).clamp_(0, 1)
        moved = goal.reached(predict(model, noisy, self.batch_size)) & ~goal.reached(logits)
        kept = torch.where(_columns(moved, images), noisy, images)
        return AttackResult(kept, goal.reached(predict(model, kept, self.batch_size)))


def _columns(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.ndim - 1))
