"""What attacks by gradients raise: losses of logits and labels, and the goal that says when an image is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from qopt.errors import UsageError

LossName = Literal["cross_entropy", "margin", "dlr"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, classes) and classes (n,) to (n,): the larger, the further the prediction is from those classes."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds against the label, (n,): ``log sum_{j != y} exp z_j - z_y``, for logits (n, classes), labels (n,).

    Cross-entropy is its softplus, so their gradients differ by one positive factor per image, which no attack here
    keeps; that factor, ``1 - p_y``, is zero in float32 from a lead of 17 on, and takes the whole gradient with it.
    """
    return _others(logits, labels).logsumexp(1) - _own(logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, (n,): positive exactly where the prediction is wrong (Carlini & Wagner 2017, f_6)."""
    return _others(logits, labels).amax(1) - _own(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (n,): the margin over the lead of the largest logit on the third largest.

    ``-(z_y - max_{j != y} z_j) / (z_pi1 - z_pi3)`` (Croce & Hein 2020, eq. 6): no shift or scale of the logits changes
    it.

    Raises:
        UsageError: there are two classes, whose ratio is always 1 or -1.
    """
    if logits.shape[1] < 3:
        raise UsageError("the loss dlr needs three classes", got=str(logits.shape[1]), fix="use the loss margin")
    largest = logits.topk(3, 1).values
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + 1e-12)


LOSSES: Mapping[LossName, Loss] = MappingProxyType({"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr})


class Goal(Protocol):
    """What an attack wants of the logits of n images, image by image."""

    def reached(self, logits: Tensor) -> Tensor:
        """Bool (n,), of logits (n, ...) without gradient."""
        ...

    def rise(self, logits: Tensor) -> Tensor:
        """What the attack raises, (n,), of float64 logits (n, ...)."""
        ...

    def fallback(self, logits: Tensor) -> Tensor:
        """What it raises, (n,), where `rise` has no usable gradient."""
        ...

    def at(self, rows: Tensor | slice) -> Goal:
        """The goal of some of the images."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Misclassified:
    """Away from ``classes``, int64 (n,), the labels; or, ``targeted``, towards them."""

    classes: Tensor
    loss: LossName = "margin"
    targeted: bool = False

    def reached(self, logits: Tensor) -> Tensor:
        """Bool (n,): whether the prediction is another class than the label, or the target."""
        return (logits.argmax(1) == self.classes) == self.targeted

    def rise(self, logits: Tensor) -> Tensor:
        """The loss, (n,), of logits (n, classes); of a target with the other sign."""
        return self._signed(LOSSES[self.loss](logits, self.classes))

    def fallback(self, logits: Tensor) -> Tensor:
        """The margin, (n,), of logits (n, classes): larger than 0 where the goal is reached."""
        return self._signed(margin(logits, self.classes))

    def at(self, rows: Tensor | slice) -> Misclassified:
        """The goal of some of the images."""
        return replace(self, classes=self.classes[rows])

    def _signed(self, loss: Tensor) -> Tensor:
        return -loss if self.targeted else loss


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf)
