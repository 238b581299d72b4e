"""Signs that a model's robustness is not its own but its gradients' fault (Athalye et al. 2018, Carlini et al. 2019).

Every rule is a pure function of what was measured, and has a function that measures it. A model with any rule
triggered is masked: the attacks by gradient did not work on it, so what they report is no robustness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, final

import torch
from torch import Tensor

from qopt.attacks.attack import Attack, Classifier
from qopt.attacks.gradient import input_gradient, unusable
from qopt.attacks.pgd import PGD
from qopt.attacks.score import BATCH_SIZE, accuracy_vector, check_images, check_labels, predict, worst_case
from qopt.errors import DataError
from qopt.threat import ThreatModel

Verdict = Literal["none", "masked"]

DEAD_SHARE = 0.01
"""Share of images without a usable gradient that is still put down to chance: trained networks have none or few."""


@final
@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: its name.
        triggered: whether it says that gradients are masked.
        numbers: what it compared; shares in [0, 1], except for ``images``, the number of images.
        tolerance: how far beyond the expected share it still puts down to chance, a share in [0, 1].
        text: one sentence with the numbers.
    """

    rule: str
    triggered: bool
    numbers: Mapping[str, float]
    tolerance: float
    text: str


def verdict(findings: Sequence[Finding]) -> Verdict:
    """``masked`` where any rule was triggered.

    Raises:
        DataError: there are no findings; nothing checked is not the same as nothing found.
    """
    if not findings:
        raise DataError("no masking rule was measured", fix="measure at least one before giving a verdict")
    return "masked" if any(finding.triggered for finding in findings) else "none"


def zero_gradients(dead: Tensor) -> Finding:
    """Rule 1: more than 1 % of the images have no usable gradient; ``dead`` bool (n,) as `dead_gradients` returns."""
    n, share = _count(dead), _share(dead)
    text = f"{share:.1%} of {n} images have an input gradient that is zero or not finite (at most {DEAD_SHARE:.0%})"
    return Finding("zero_gradients", share > DEAD_SHARE, {"share": share, "images": n}, DEAD_SHARE, text)


def dead_gradients(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Bool (n,): whether the input gradient of the log-odds at the clean image is all zero or not finite.

    The log-odds have the direction of cross-entropy without its saturation: a confident model is not a masked one.

    Raises:
        DataError: the images or labels do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    check_images(images)
    labels = check_labels(labels, len(images), predict(model, images[:1]).shape[1])
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    return torch.cat([unusable(input_gradient(model, *batch, "cross_entropy")) for batch in batches])


def unbounded_attack(correct: Tensor) -> Finding:
    """Rule 2: an attacker who may paint any image whatever leaves accuracy, by more than one image.

    ``correct`` bool (n,) as `unbounded_correct` returns.
    """
    n, share = _count(correct), _share(correct)
    tolerance = 1 / n
    text = f"unbounded PGD (linf 1) leaves {share:.1%} of {n} images classified right (at most {tolerance:.1%})"
    return Finding("unbounded_attack", int(correct.sum()) > 1, {"accuracy": share, "images": n}, tolerance, text)


def unbounded_correct(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    indices: Tensor | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Bool (n,): whether an image is still classified right after PGD with linf eps = 1 from the clean image and from
    one random image. (More random starts would be a search without gradients.)

    Raises:
        DataError: the images, labels or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    anywhere = ThreatModel("linf", 1.0)
    attacks = (
        PGD(steps=40, step=0.05, random_start=False, batch_size=batch_size),
        PGD(steps=20, batch_size=batch_size),
    )
    left = [a(model, images, labels, anywhere, seed=seed, indices=indices).correct for a in attacks]
    return worst_case(left)


def transfer_stronger(white: Tensor, transferred: Tensor) -> Finding:
    """Rule 3: examples made on another model fool this one more often than those made on itself.

    ``white`` and ``transferred``, bool (n,), say which images are classified right under either. The tolerance is two
    standard errors of the white-box accuracy, and at least one image.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    n = _count(white)
    if _count(transferred) != n:
        raise DataError(
            "both vectors must be about the same images", expected=f"{n} entries", got=f"{_count(transferred)}"
        )
    own, other = _share(white), _share(transferred)
    tolerance = max(2 * sqrt(own * (1 - own) / n), 1 / n)
    # In whole images, so that a difference of exactly the tolerance does not hang on rounding.
    triggered = int(white.sum()) - int(transferred.sum()) > tolerance * n + 1e-9
    text = (
        f"accuracy under transferred examples {other:.1%}, under white-box ones {own:.1%}, on {n} images "
        f"(at most {tolerance:.1%} lower)"
    )
    numbers = {"white_box": own, "transferred": other, "images": n}
    return Finding("transfer_stronger", triggered, numbers, tolerance, text)


def transferred_correct(
    source: Classifier,
    target: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    indices: Tensor | None = None,
    attack: Attack | None = None,
) -> Tensor:
    """Bool (n,): whether ``target`` is right about the examples that ``attack`` makes on ``source``.

    The default attack is PGD that takes all its steps: examples that stop at the source's boundary transfer badly.
    Images that the source gets wrong are passed on as they are.

    Raises:
        DataError: the images, labels or indices do not fit.
        ModelError: an output is no finite matrix of logits.
    """
    made = (attack or PGD(compact=False))(source, images, labels, threat, seed=seed, indices=indices)
    return accuracy_vector(target, made.adversarial, labels)


def _count(vector: Tensor) -> int:
    if vector.dtype != torch.bool or vector.ndim != 1 or not len(vector):
        raise DataError(
            "a masking rule needs one boolean per image", got=f"{vector.dtype} of shape {tuple(vector.shape)}"
        )
    return len(vector)


def _share(vector: Tensor) -> float:
    return int(vector.sum()) / len(vector)
