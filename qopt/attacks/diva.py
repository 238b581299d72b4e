"""DIVA (Hao et al., MLSys 2022): inputs that fool the quantized network and not the float one it was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import Ascent, aim, check_indices, check_options, check_positive, climb
from qopt.attacks.losses import margin
from qopt.attacks.score import BATCH_SIZE, predict
from qopt.errors import DataError, ModelError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True, eq=False)
class DIVA:
    """PGD on ``p_float(y | x') - c * p_quantized(y | x')``, given to the quantized network as its attack.

    An image returned is the last on the way that only the float network got right, or else the one at which the steps
    ended, so fewer images are fooled than by PGD, and more of them unseen by whoever checks them in float.

    Attributes:
        reference: the float network, which is to stay right.
        c: weight of the quantized network, larger than 0.
        steps: gradient steps.
        step: their length in the norm of the threat model; None for a quarter of eps.
        random_start: start at a random point of the ball; otherwise at the clean image.
        compact: evasive images leave the batch at once.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    reference: Classifier
    c: float = 1.0
    steps: int = 20
    step: float | None = None
    random_start: bool = True
    compact: bool = True
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("DIVA", "margin", steps=self.steps, batch_size=self.batch_size)
        check_positive("DIVA", step=self.step, c=self.c)

    @property
    def name(self) -> str:
        """For example ``DIVA-20``."""
        return f"DIVA-{self.steps}"

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
        """Attack the quantized ``model`` on ``images`` (n, ...), float32 in [0, 1].

        Raises:
            DataError: images, labels or indices do not fit.
            ModelError: an output is no finite matrix of logits, or the two networks have different classes.
        """
        logits = predict(model, images, self.batch_size)
        plain = aim(labels, None, logits)
        classes = predict(self.reference, images[:1]).shape[1]
        if classes != logits.shape[1]:
            raise ModelError(
                "the float network has other classes", where="DIVA", expected=str(logits.shape[1]), got=str(classes)
            )
        rows = (~plain.reached(logits)).nonzero().flatten()
        options = Ascent(
            steps=self.steps,
            step=threat.eps / 4 if self.step is None else self.step,
            start="ball" if self.random_start else "clean",
            compact=self.compact,
            batch_size=self.batch_size,
        )
        numbers = check_indices(indices, len(images))
        goal = _Evasive(plain.classes, self.c)
        adversarial = climb(self._both(model), images, rows, goal, threat, options, seed=seed, numbers=numbers)
        return AttackResult(adversarial, plain.reached(predict(model, adversarial, self.batch_size)))

    def _both(self, model: Classifier) -> Classifier:
        """Logits (n, 2, classes): of the quantized network, of the float one."""
        return lambda images: torch.stack([model(images), self.reference(images)], 1)


@final
@dataclass(frozen=True, eq=False)
class _Evasive:
    """Wrong in the first of two rows of logits, right in the second."""

    labels: Tensor
    c: float

    def reached(self, logits: Tensor) -> Tensor:
        quantized, reference = (logits.argmax(2) == self.labels[:, None]).unbind(1)
        return reference & ~quantized

    def rise(self, logits: Tensor) -> Tensor:
        label = self.labels[:, None, None].expand(-1, 2, 1)
        quantized, reference = logits.softmax(2).gather(2, label).squeeze(2).unbind(1)
        return reference - self.c * quantized

    def fallback(self, logits: Tensor) -> Tensor:
        return margin(logits[:, 0], self.labels)

    def at(self, rows: Tensor | slice) -> _Evasive:
        return replace(self, labels=self.labels[rows])


def evasive_rate(
    reference_correct: Tensor, quantized_correct: Tensor, clean_reference: Tensor, clean_quantized: Tensor
) -> float:
    """Share in [0, 1] of images that fool the quantized network and not the float one, of those both get right.

    Args:
        reference_correct: bool (n,), whether the float network is right on the adversarial images.
        quantized_correct: bool (n,), whether the quantized one is.
        clean_reference: bool (n,), whether the float network is right on the clean images.
        clean_quantized: bool (n,), whether the quantized one is.

    Raises:
        DataError: the vectors are about different images, or no image is right in both networks.
    """
    vectors = (reference_correct, quantized_correct, clean_reference, clean_quantized)
    if len({v.shape for v in vectors}) != 1 or any(v.dtype != torch.bool or v.ndim != 1 for v in vectors):
        raise DataError(
            "the evasive rate needs four vectors of booleans, all about the same images",
            got=", ".join(f"{v.dtype} of shape {tuple(v.shape)}" for v in vectors),
        )
    both = clean_reference & clean_quantized
    if not both.any():
        raise DataError("no clean image is right in both networks", where="the evasive rate")
    return float((reference_correct & ~quantized_correct)[both].double().mean())
