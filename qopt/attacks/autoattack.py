"""AutoAttack (Croce & Hein 2020): four attacks with nothing to tune, in turn, each on what those before it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.attacks.apgd import APGD
from qopt.attacks.attack import Attack, AttackResult, Classifier, MinimumAttack, keep_within
from qopt.attacks.fab import FAB
from qopt.attacks.gradient import check_indices
from qopt.attacks.score import BATCH_SIZE, accuracy_vector
from qopt.attacks.square import Square
from qopt.errors import UsageError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class Within:
    """A minimum attack as an attack of a threat model: what it finds counts where the distortion is at most eps."""

    attack: MinimumAttack

    @property
    def name(self) -> str:
        """The name of the attack."""
        return self.attack.name

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; see `keep_within`."""
        return keep_within(self.attack(model, images, labels, seed=seed, indices=indices), images, threat)


def standard(threat: ThreatModel, batch_size: int = BATCH_SIZE) -> tuple[Attack, ...]:
    """The standard suite: APGD-CE, APGD-T and FAB-T against 9 classes, 100 steps each, and Square with 5000 queries.

    Networks of fewer than ten classes have all their classes attacked; for fewer than four see `apgd.targeted_dlr`.
    """
    return (
        APGD(batch_size=batch_size),
        APGD("dlr", targets=9, batch_size=batch_size),
        Within(FAB(threat.norm, threat.eps, batch_size=batch_size)),
        Square(batch_size=batch_size),
    )


@final
@dataclass(frozen=True, eq=False)
class PartResult:
    """The outcome of several attacks in turn.

    Attributes:
        whole: what they found together: for each image what the first attack that fooled it made, or else the last one.
        correct: by name, bool (n,), which images are still classified right after that attack and those before it.
    """

    whole: AttackResult
    correct: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class AutoAttack:
    """Attacks in turn, each on the images that withstood those before it: the worst case, image by image.

    Attributes:
        parts: the attacks; None for `standard`.
        batch_size: images per forward pass of the standard ones.

    Raises:
        UsageError: there are no parts, or two have one name.
    """

    parts: tuple[Attack, ...] | None = None
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if self.parts is not None:
            names = [part.name for part in self.parts]
            if not names or len(set(names)) < len(names):
                raise UsageError(
                    "a suite needs attacks of different names", where="AutoAttack", got=", ".join(names) or "none"
                )
        elif self.batch_size < 1:
            raise UsageError(
                "batch_size must be a whole number, 1 or larger", where="AutoAttack", got=repr(self.batch_size)
            )

    @property
    def name(self) -> str:
        """``AutoAttack``, with the names of its parts where they are not the standard ones."""
        return "AutoAttack" if self.parts is None else f"AutoAttack ({', '.join(part.name for part in self.parts)})"

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; chance depends on ``seed`` and ``indices`` as in the parts."""
        return self.run(model, images, labels, threat, seed=seed, indices=indices).whole

    def run(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
    ) -> PartResult:
        """The same attack, with what every part left."""
        left = accuracy_vector(model, images, labels, self.batch_size)
        numbers = check_indices(indices, len(images))
        adversarial, correct = images.detach().clone(), dict[str, Tensor]()
        for part in standard(threat, self.batch_size) if self.parts is None else self.parts:
            rows = left.nonzero().flatten()
            if len(rows) and threat.eps > 0:
                own = numbers[rows.to(numbers.device)]
                result = part(model, images[rows], labels[rows], threat, seed=seed, indices=own)
                adversarial[rows] = result.adversarial
                left = left.index_put((rows,), result.correct)
            correct[part.name] = left
        return PartResult(AttackResult(adversarial, ~left), correct)
