"""A weight in training, whatever formats its output channels have: one `SoftRounding` for each part."""

from __future__ import annotations

from typing import final

from torch import Tensor

from qopt.errors import UsageError
from qopt.quant.adaround import SoftRounding, mixed
from qopt.quant.rows import AnyWeight, QuantizedRows, parts_of, with_parts


@final
class SoftWeight:
    """Starts where `SoftRounding` starts, part by part.

    Attributes:
        trained: the V of each part; what an optimiser takes.
    """

    def __init__(self, target: Tensor, like: AnyWeight) -> None:
        """``target`` is the float weight, shape of ``like``; UsageError for shapes that differ."""
        if target.shape != like.shape:
            raise UsageError(
                "codes of another weight", expected=str(tuple(target.shape)), got=str(tuple(like.shape))
            )  # fmt: skip
        self._like = like
        self._soft = [SoftRounding(target.index_select(like.axis, rows), part) for part, rows in parts_of(like)]
        self.trained = [part.v for part in self._soft]

    @property
    def parts(self) -> list[Tensor]:
        """How much of the way each weight is from its lower to its upper level, in [0, 1], part by part."""
        return [soft.part for soft in self._soft]

    def weight(self, parts: list[Tensor]) -> Tensor:
        """The soft weight, float32; ``parts`` is `parts`, which the penalty needs as well."""
        found = [soft.weight(part) for soft, part in zip(self._soft, parts, strict=True)]
        return self._like.joined(found) if isinstance(self._like, QuantizedRows) else found[0]

    def rounded(self) -> AnyWeight:
        """The codes that the parts are nearer to."""
        return with_parts(self._like, [soft.rounded() for soft in self._soft])


def better_channels(given: AnyWeight, other: AnyWeight, better: Tensor) -> AnyWeight:
    """The codes of ``other`` for the channels of which it is ``better``: bool (channels,), or (1,) for all of them."""
    every = better.expand(given.shape[given.axis])
    pairs = zip(parts_of(given), parts_of(other), strict=True)
    whole = not isinstance(given, QuantizedRows)
    return with_parts(given, [mixed(a, b, better if whole else every[rows]) for (a, rows), (b, _) in pairs])
