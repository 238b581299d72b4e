"""The images that an attacker may reach, and the extremes of a linear function on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qopt.errors import DataError
from qopt.threat import ThreatModel

WIDER: Final = 1e-6
"""Added to eps, in each norm: what attacks leave to rounding (`qopt.attacks.attack.keep_within`)."""


@final
@dataclass(frozen=True, eq=False)
class Ball:
    """Images within ``eps`` of ``centre``, pixels in [0, 1], a little wider than the threat model says.

    Attributes:
        centre: float64 (n, *image).
        low, high: the smallest and largest value that each pixel can take.
        radius: of the l2 ball; None where ``low`` and ``high`` say it all.
    """

    centre: Tensor
    low: Tensor
    high: Tensor
    radius: float | None

    @staticmethod
    def around(images: Tensor, threat: ThreatModel) -> Ball:
        """The ball of every image (n, ...); raises DataError where a pixel is outside [0, 1] or not finite."""
        centre = images.detach().double()
        if not bool(((centre >= 0) & (centre <= 1)).all()):
            raise DataError("pixels must lie in [0, 1]", where="certificates", got="others, or NaN")
        eps = threat.eps + WIDER
        low, high = (centre - eps).clamp(min=0.0), (centre + eps).clamp(max=1.0)
        return Ball(centre, low, high, eps if threat.norm == "l2" else None)

    def part(self, rows: Tensor) -> Ball:
        """The balls of some images, by their numbers."""
        return Ball(self.centre[rows], self.low[rows], self.high[rows], self.radius)

    def smallest(self, rows: Tensor) -> Tensor:
        """A lower bound of ``rows . x``: (n,), float64, of (n, *image), one row per image; exact for linf.

        For l2 it is the Lagrangian dual at the multiplier that is best without the box, so never below
        ``rows . centre - radius |rows|_2``, or the box's own bound where that is larger.
        """
        rows = rows.double().flatten(1)
        centre, low, high = self.centre.flatten(1), self.low.flatten(1), self.high.flatten(1)
        at_ends = torch.where(rows > 0, rows * low, rows * high)
        box = at_ends.sum(1) - rounding(at_ends)
        if self.radius is None:
            return box
        length = rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
        multiplier = length / (2 * self.radius)
        x = torch.minimum(torch.maximum(centre - rows / (2 * multiplier), low), high)
        penalty = multiplier * (x - centre) ** 2
        terms = rows * x
        dual = (terms + penalty).sum(1) - multiplier[:, 0] * self.radius**2
        dual = dual - rounding(terms) - rounding(penalty) - 1e-12 * multiplier[:, 0] * self.radius**2
        return torch.maximum(box, dual)


def rounding(terms: Tensor) -> Tensor:
    """How far a float64 sum of ``terms`` (n, k) over the last axis may be off, four times over."""
    return 4 * (terms.shape[1] + 4) * 2.0**-53 * terms.abs().sum(1)
