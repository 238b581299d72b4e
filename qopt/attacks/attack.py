"""What an attack is: the classifier it is given, the result it returns, and the protocol that plug-ins implement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

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
        adversarial: images like the clean ones, inside the ball (up to 1e-6) and the box [0, 1]; the clean image
            itself where the model was wrong before the attack.
        fooled: bool (n,), whether the model's prediction on ``adversarial`` differs from the label.
    """

    adversarial: Tensor
    fooled: Tensor

    @property
    def correct(self) -> Tensor:
        """Bool (n,): whether the image is still classified right; the mean is the accuracy under attack."""
        return ~self.fooled


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
