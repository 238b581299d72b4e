"""What an attack is: the classifier it is given, the result it returns, and the protocol that plug-ins implement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from qopt.threat import ThreatModel

Classifier = Callable[[Tensor], Tensor]
"""Images (n, ...), usually (n, c, h, w), float32 in [0, 1], to logits (n, classes). Each row depends on its image only
(batch norm in evaluation mode), and normalisation of the input, if any, is inside."""


@final
@dataclass(frozen=True, eq=False)
class AttackResult:
    """The outcome of one attack, one entry per image, in the order of the images.

    Attributes:
        adversarial: images like the clean ones, inside the box [0, 1] and, of an `Attack`, inside the ball (up to
            1e-6); the clean image itself where the model was wrong before the attack.
        fooled: bool (n,), whether the model's prediction on ``adversarial`` differs from the label; of a targeted
            attack, whether it is the target.
    """

    adversarial: Tensor
    fooled: Tensor

    @property
    def correct(self) -> Tensor:
        """Bool (n,): whether the image is still classified right; the mean is the accuracy under attack."""
        return ~self.fooled


def keep_within(result: AttackResult, images: Tensor, threat: ThreatModel) -> AttackResult:
    """``result`` on ``images`` (n, ...) as an attack of ``threat``: a larger distortion did not fool.

    Images further away than eps (1e-6 is left to rounding) are replaced by the clean ones.
    """
    moved = (result.adversarial - images).flatten(1)
    distortion = moved.abs().amax(1) if threat.norm == "linf" else moved.norm(dim=1)
    # An image that was wrong from the start has not moved.
    inside = distortion <= threat.eps + 1e-6
    kept = torch.where(inside.reshape(-1, *[1] * (images.ndim - 1)), result.adversarial, images)
    return AttackResult(kept, result.fooled & inside)


class Attack(Protocol):
    """An attack of a declared threat model; its options are the fields of a frozen dataclass."""

    @property
    def name(self) -> str:
        """The name that tables show; it tells attacks of one suite apart."""
        ...

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
        """Attack ``images`` (n, ...), float32 in [0, 1], whose true classes are ``labels`` (n,).

        Chance for one image may depend only on ``seed`` and its number in ``indices`` (n,), by default 0..n-1, so
        that attacking a part of a data set with the numbers it has there gives what attacking the whole gives.
        """
        ...


class MinimumAttack(Protocol):
    """An attack that looks for the smallest distortion that fools, in a norm of its own, without any bound on it.

    It counts for a threat model as far as `keep_within` leaves its examples; its mean distortions stand on their own.
    """

    @property
    def name(self) -> str:
        """The name that tables show; it tells attacks of one suite apart."""
        ...

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int, indices: Tensor | None = None
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1], whose true classes are ``labels`` (n,).

        An image that nothing was found for comes back as it is, not fooled. Chance as for an `Attack`.
        """
        ...
