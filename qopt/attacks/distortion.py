"""How far adversarial examples lie from their images: the statistics that papers print beside accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.attacks.attack import AttackResult
from qopt.errors import DataError
from qopt.threat import Norm


@final
@dataclass(frozen=True)
class Distortion:
    """Distortions of the successful examples of one attack, in pixel values; 0 where there are none.

    Attributes:
        images: how many there are: images that were right before the attack and are wrong after it.
        mean_l2: mean of their l2 norms.
        mean_linf: mean of their largest changes of a pixel, in [0, 1].
        median_l2: median of the former, the lower of two middle ones.
        median_linf: median of the latter.
    """

    images: int
    mean_l2: float
    mean_linf: float
    median_l2: float
    median_linf: float


def distortion(result: AttackResult, images: Tensor, clean_correct: Tensor) -> Distortion:
    """The statistics of ``result`` on the clean ``images`` (n, ...), of which ``clean_correct``, bool (n,), were right.

    Where images leave an attack as soon as they are fooled, they are nearer than in the literature: take its
    ``compact=False`` for figures to compare with.

    Raises:
        DataError: the shapes do not fit.
    """
    l2, linf = (distances(result.adversarial, images, norm) for norm in ("l2", "linf"))
    if clean_correct.shape != l2.shape:
        raise DataError(
            "clean_correct must be about the same images", expected=f"shape {tuple(l2.shape)}",
            got=f"shape {tuple(clean_correct.shape)}",
        )  # fmt: skip
    moved = result.fooled & clean_correct
    count = int(moved.sum())
    if not count:
        return Distortion(0, 0.0, 0.0, 0.0, 0.0)
    l2, linf = l2[moved], linf[moved]
    return Distortion(count, float(l2.mean()), float(linf.mean()), float(l2.median()), float(linf.median()))


def distances(adversarial: Tensor, images: Tensor, norm: Norm) -> Tensor:
    """Distance of each of ``adversarial`` (n, ...) from its clean image in ``images`` (n, ...): float64 (n,).

    Raises:
        DataError: the shapes differ.
    """
    if adversarial.shape != images.shape:
        raise DataError(
            "adversarial and clean images must pair up", expected=f"shape {tuple(images.shape)}",
            got=f"shape {tuple(adversarial.shape)}",
        )  # fmt: skip
    moved = (adversarial - images).double().flatten(1)
    return moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
