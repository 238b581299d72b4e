"""The attacks of the low-bitwidth study (Bernhard et al. 2019), and examples made with them on one network each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.attacks import BIM, CW, FGSM, PGD, SPSA, Classifier
from qopt.cache import Cache, digest_arrays
from qopt.measure.network import Normalisation
from qopt.measure.robustness import BATCH, loss_gradients
from qopt.measure.subject import Subject
from qopt.seeds import derive
from qopt.threat import ThreatModel

AnyAttack = FGSM | BIM | PGD | CW | SPSA


@final
@dataclass(frozen=True)
class Method:
    """One attack of the study, or several of which the one that transfers best counts.

    Attributes:
        name: for tables.
        bound: how far examples may be from their images.
        attacks: by what tells them apart, which is empty where there is only one.
        queries: whether it asks the file itself, and needs no gradient.
    """

    name: str
    bound: str
    attacks: Mapping[str, AnyAttack]
    queries: bool = False


def _fgsm(threat: ThreatModel, steps: int, kappas: tuple[float, ...]) -> Method:
    return _bounded(FGSM(batch_size=BATCH), threat)


def _bim(threat: ThreatModel, steps: int, kappas: tuple[float, ...]) -> Method:
    """Steps that just reach the surface of the ball, all of them taken: such examples transfer."""
    return _bounded(BIM(steps, threat.eps / steps or None, compact=False, batch_size=BATCH), threat)


def _pgd(threat: ThreatModel, steps: int, kappas: tuple[float, ...]) -> Method:
    return _bounded(PGD(steps, compact=False, batch_size=BATCH), threat)


def _cw(threat: ThreatModel, steps: int, kappas: tuple[float, ...]) -> Method:
    plain = replace(CW.low_bitwidth(), steps=steps, batch_size=BATCH)
    attacks = {f"kappa {kappa:g}": replace(plain, kappa=kappa) for kappa in kappas}
    return Method(plain.name, "the smallest l2 distance found", MappingProxyType(attacks))


def _spsa(threat: ThreatModel, steps: int, kappas: tuple[float, ...]) -> Method:
    return replace(_bounded(SPSA(steps), threat), queries=True)


def _bounded(attack: AnyAttack, threat: ThreatModel) -> Method:
    return Method(attack.name, str(threat), MappingProxyType({"": attack}))


METHODS: Final[Mapping[str, Callable[[ThreatModel, int, tuple[float, ...]], Method]]] = MappingProxyType(
    {"fgsm": _fgsm, "bim": _bim, "pgd": _pgd, "cw": _cw, "spsa": _spsa}
)
"""By the word that users write: from the threat model, steps and kappas of the run."""


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """What examples are made of.

    Attributes:
        images: float32 (n, ...) in [0, 1], as all networks take them.
        labels: int64 (n,).
        threat: of the bounded attacks.
        normalisation: the one that lies outside all networks.
        seed: of the run.
        cache: keeps examples and gradients by content.
    """

    images: Tensor
    labels: Tensor
    threat: ThreatModel
    normalisation: Normalisation
    seed: int
    cache: Cache

    @property
    def digest(self) -> str:
        """Of images and labels."""
        return digest_arrays(self.images.numpy(), self.labels.numpy())

    def examples(self, subject: Subject, attack: AnyAttack, outputs: Tensor, queries: bool) -> Tensor:
        """Images (n, ...) that ``attack`` makes on the network's twin, or with ``queries`` on its file.

        ``outputs`` (n, classes) are the file's logits on the clean images, which tell a file from one whose weights
        lie outside of it and have changed. The seed does not depend on the network: the same chance for all.
        """
        key = self._key(subject, outputs) | {"attack": repr(attack), "threat": [self.threat.norm, self.threat.eps]}
        seed = derive(self.seed, "compare", attack.name)

        def compute() -> dict[str, NDArray[np.float32]]:
            model = subject.artefact if queries else subject.gradients
            return {"images": self._attack(model, attack, seed).numpy()}

        return torch.from_numpy(self.cache.arrays("examples", key | {"seed": seed}, compute)["images"])

    def gradients(self, subject: Subject, outputs: Tensor) -> Tensor:
        """Gradients, like the images, of the cross-entropy of the network's twin on the clean images."""

        def compute() -> dict[str, NDArray[np.float32]]:
            return {"gradients": loss_gradients(subject.gradients, self.images, self.labels).numpy()}

        return torch.from_numpy(self.cache.arrays("gradients", self._key(subject, outputs), compute)["gradients"])

    def _attack(self, model: Classifier, attack: AnyAttack, seed: int) -> Tensor:
        if isinstance(attack, CW):
            return attack(model, self.images, self.labels, seed=seed).adversarial
        return attack(model, self.images, self.labels, self.threat, seed=seed).adversarial

    def _key(self, subject: Subject, outputs: Tensor) -> dict[str, object]:
        return {
            "model": subject.digest, "outputs": digest_arrays(outputs.numpy()), "data": self.digest,
            "normalisation": [self.normalisation.mean, self.normalisation.std],
        }  # fmt: skip
