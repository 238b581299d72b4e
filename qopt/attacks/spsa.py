"""SPSA (Uesato et al. 2018): gradients estimated from queries along random directions, followed by Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import direction, project
from qopt.attacks.gradient import check_options, check_positive
from qopt.attacks.queries import QUERIES, margins, right_before
from qopt.attacks.score import accuracy_vector, predict
from qopt.errors import UsageError
from qopt.seeds import derive
from qopt.threat import ThreatModel

DECAY, DECAY_OF_SQUARES, TINY = 0.9, 0.999, 1e-12


@final
@dataclass(frozen=True)
class SPSA:
    """Adam on the margin, its gradient estimated as the mean of ``(f(x + d v) - f(x - d v)) / 2d * v``, v of +-1.

    Needs no gradient, so that it works on any callable and is not deceived by rounding finer than ``delta``. The
    defaults are those of Bernhard et al. 2019. In l2, steps follow Adam's running mean itself: divided by the root of
    the squares it is a direction for linf, and found less. It starts at the clean image and asks about images inside
    the box [0, 1] only. An image leaves as soon as it is fooled.

    Attributes:
        steps: updates of each image.
        learning_rate: of Adam, in pixel values; in l2, the length of a step. None for a third of eps: the 0.01 of
            Bernhard et al. at their eps of 0.03.
        delta: length of a query's step in every pixel.
        samples: evaluations per estimate, two for every direction: even.
        batch_size: evaluations per forward pass, which also bounds the memory.

    Raises:
        UsageError: an option is out of its range.
    """

    steps: int = 100
    learning_rate: float | None = None
    delta: float = 0.01
    samples: int = 128
    batch_size: int = QUERIES

    def __post_init__(self) -> None:
        check_options("SPSA", "margin", steps=self.steps, samples=self.samples, batch_size=self.batch_size)
        if self.samples % 2:
            raise UsageError("samples come in pairs", where="SPSA", expected="an even number", got=repr(self.samples))
        check_positive("SPSA", learning_rate=self.learning_rate, delta=self.delta)

    @property
    def name(self) -> str:
        """For example ``SPSA-100``: the steps."""
        return f"SPSA-{self.steps}"

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
        """Attack ``images`` (n, ...), float32 in [0, 1], with at most ``(samples + 1) * steps`` queries for each.

        The directions drawn for an image depend on ``seed`` and its entry of ``indices`` only.

        Raises:
            DataError: the images, labels or indices do not fit.
            ModelError: the output is no finite matrix of logits.
        """
        labels, numbers, rows = right_before(model, images, labels, indices, self.batch_size)
        adversarial = images.detach().clone()
        if threat.eps > 0 and len(rows):
            for chunk in torch.split(rows, max(1, self.batch_size // self.samples)):
                draws = [np.random.default_rng(derive(seed, "spsa", numbers[row])) for row in chunk.tolist()]
                adversarial[chunk] = self._climb(model, adversarial[chunk], labels[chunk], threat, draws)
        return AttackResult(adversarial, ~accuracy_vector(model, adversarial, labels, self.batch_size))

    def _climb(
        self, model: Classifier, clean: Tensor, labels: Tensor, threat: ThreatModel, draws: list[np.random.Generator]
    ) -> Tensor:
        """The first fooling image of each of ``clean`` (k, ...), or else its last one."""
        images, result = clean, clean.clone()
        active = torch.arange(len(clean), device=clean.device)
        length = threat.eps / 3 if self.learning_rate is None else self.learning_rate
        mean, square = torch.zeros_like(clean), torch.zeros_like(clean)
        for step in range(1, self.steps + 1):
            gradient = self._estimate(model, images, labels, [draws[row] for row in active.tolist()])
            mean = DECAY * mean + (1 - DECAY) * gradient
            square = DECAY_OF_SQUARES * square + (1 - DECAY_OF_SQUARES) * gradient**2
            if threat.norm == "linf":
                spread = (square / (1 - DECAY_OF_SQUARES**step)).sqrt()
                move = mean / (1 - DECAY**step) / (spread + TINY)
            else:
                move = direction(mean, images, "l2")
            images = project(images + length * move, clean, threat)
            result[active] = images
            left = predict(model, images, self.batch_size).argmax(1) == labels
            if not left.any():
                break
            active, images, clean, labels, mean, square = (
                t[left] for t in (active, images, clean, labels, mean, square)
            )
        return result

    def _estimate(self, model: Classifier, images: Tensor, labels: Tensor, draws: list[np.random.Generator]) -> Tensor:
        """Estimated gradients of the margin at ``images`` (k, ...), in pairs that fit one forward pass."""
        signs = torch.stack([_signs(draw, self.samples // 2, images) for draw in draws])
        total = torch.zeros_like(images)
        for part in torch.split(signs, max(1, self.batch_size // (2 * len(images))), dim=1):
            step = self.delta * part
            queries = torch.cat([images[:, None] + step, images[:, None] - step], 1).clamp_(0, 1)
            ahead, behind = margins(model, queries, labels, self.batch_size).chunk(2, dim=1)
            slopes = ((ahead - behind) / (self.samples * self.delta)).to(images.dtype)
            total += torch.einsum("kq,kq...->k...", slopes, part)
        return total


def _signs(draw: np.random.Generator, count: int, images: Tensor) -> Tensor:
    """Fair signs, +-1 in float32: ``count`` of them for every pixel of an image of ``images`` (k, ...)."""
    needed = count * images[0].numel()
    bits = np.unpackbits(np.frombuffer(draw.bytes((needed + 7) // 8), dtype=np.uint8), count=needed)
    signs = torch.from_numpy(bits).to(images.device, images.dtype).mul_(2).sub_(1)
    return signs.reshape(count, *images.shape[1:])
