"""Rounding that is trained: each weight learns which of two neighbouring levels it takes (Nagel et al. 2020, AdaRound).

The soft weight is ``(l + (u - l) h(V)) s``: l and u two neighbouring levels of the format, s the scale, V what is
trained, and h the rectified sigmoid of Louizos et al. 2018, which reaches 0 and 1. A penalty (equation 24) whose
exponent falls while training pushes every h(V) to one of the two. Nothing depends on what the levels look like: linear,
mid-rise, ternary and power-of-two formats are all trained alike.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant.quantized import QuantizedWeight

ZETA: Final = 1.1
GAMMA: Final = -0.1
"""The ends that the sigmoid is stretched to before it is clipped to [0, 1]."""

FIRST_BETA: Final = 20.0
LAST_BETA: Final = 2.0
"""The penalty's exponent where it sets in, when it only moves what is nearly decided, and at the end."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`` (equation 23), of any shape."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(part: Tensor) -> Tensor:
    """The V of smallest magnitude with ``h(V) = part``, for parts in [0, 1]."""
    return torch.logit((part - GAMMA) / (ZETA - GAMMA))


def penalty(part: Tensor, beta: float) -> Tensor:
    """``sum of 1 - |2 h - 1|^beta`` (equation 24): zero where all parts are 0 or 1, one for each that is 1/2."""
    return (1.0 - (2.0 * part - 1.0).abs().pow(beta)).sum()


def beta_at(step: int, steps: int, warm_up: float) -> float | None:
    """The exponent at a step: None during the warm-up (no penalty), then a line from `FIRST_BETA` to `LAST_BETA`.

    Args:
        step: 0 to steps - 1.
        steps: all of them, at least 1.
        warm_up: the part of the steps without a penalty, in [0, 1).

    Raises:
        UsageError: for arguments out of range.
    """
    if not (0 <= step < steps and 0.0 <= warm_up < 1.0):
        got = f"step {step} of {steps}, warm-up {warm_up}"
        raise UsageError("no such step of a training", expected="0 <= step < steps, 0 <= warm-up < 1", got=got)
    first = math.ceil(warm_up * steps)
    if step < first:
        return None
    done = (step - first) / max(steps - 1 - first, 1)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * done


@final
class SoftRounding:
    """One weight between levels.

    Attributes:
        v: what is trained, float32, shape of the weight; requires a gradient.
    """

    def __init__(self, target: Tensor, like: QuantizedWeight) -> None:
        """Start where the soft weight is ``target``, as far as the two levels of each weight reach.

        The two are those around the target where the code in ``like`` is one of them (rounding to nearest always
        is), else the code's level and its neighbour on the target's side.

        Args:
            target: the float weight, shape of ``like.codes``.
            like: the same weight rounded in any way: format, levels, scales and the codes to start from.

        Raises:
            UsageError: for shapes that differ.
        """
        if target.shape != like.codes.shape:
            raise UsageError(
                "codes of another weight", expected=str(tuple(target.shape)), got=str(tuple(like.codes.shape))
            )  # fmt: skip
        levels, self._codes = like.levels()
        self._like = like
        scale, zero = like.spread(like.scale.to(torch.float64)), _zero(like)
        multiple = target.to(torch.float64) / torch.where(scale == 0, 1.0, scale) + zero
        self._low = _lower_index(multiple, _index(like, self._codes), levels)
        low, high = levels[self._low], levels[self._low + 1]
        part = ((multiple - low) / (high - low)).clamp(0.0, 1.0)
        self._base = ((low - zero) * scale).to(torch.float32)
        self._span = ((high - low) * scale).to(torch.float32)
        self.v = inverse_rectified_sigmoid(part).to(torch.float32).requires_grad_()

    @property
    def part(self) -> Tensor:
        """``h(V)``: how much of the way from the lower to the upper level, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def weight(self, part: Tensor) -> Tensor:
        """The soft weight, float32; ``part`` is `part`, which the penalty needs as well."""
        return torch.addcmul(self._base, self._span, part)

    def rounded(self) -> QuantizedWeight:
        """The codes that the parts are nearer to; halves go up. Weights of a row without a scale keep theirs."""
        index = self._low + (self.part.detach() >= 0.5)
        moves = (self._like.spread(self._like.scale) != 0).expand_as(index)
        return replace(self._like, codes=torch.where(moves, self._codes[index], self._like.codes))


def mixed(given: QuantizedWeight, other: QuantizedWeight, better: Tensor) -> QuantizedWeight:
    """The codes of ``other`` for the channels of which it is ``better``: bool (channels,), or (1,) for all of them."""
    shape = [-1 if axis == given.axis else 1 for axis in range(given.codes.ndim)]
    return replace(given, codes=torch.where(better.reshape(shape), other.codes, given.codes))


def _lower_index(multiple: Tensor, current: Tensor, levels: Tensor) -> Tensor:
    """The lower of the two levels of each weight, as an index that leaves room for the upper one."""
    around = torch.bucketize(multiple, levels, right=True) - 1
    # the code's level and the one towards the target: above it where the target is, below it elsewhere
    return torch.minimum(torch.maximum(around, current - 1), current).clamp(0, len(levels) - 2)


def _index(like: QuantizedWeight, codes: Tensor) -> Tensor:
    """Which level each code selects, int64."""
    position = torch.zeros(256, dtype=torch.int64)
    position[codes.long()] = torch.arange(len(codes))  # negative codes count from the end, here and when read
    return position[like.codes.long()]


def _zero(like: QuantizedWeight) -> Tensor | float:
    """The level that stands for zero, float64, one for each weight or broadcast to them."""
    return 0.0 if like.zero is None else like.spread(like.zero.to(torch.float64))
