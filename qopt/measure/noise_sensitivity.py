"""How far an attack moves what every layer makes: the adversarial noise sensitivity of QUANOS (Panda 2020)."""

from __future__ import annotations

from torch import Tensor

from qopt.attacks import FGSM
from qopt.measure.amplification import layer_activity
from qopt.measure.network import TwinClassifier
from qopt.threat import ThreatModel


def noise_sensitivity(
    model: TwinClassifier, images: Tensor, labels: Tensor, threat: ThreatModel, *, batch_size: int
) -> dict[str, float]:
    """Layer to ``ANS = ||A_adv - A||_2 / ||A||_2`` of its output A, the mean over images; 0 where every A is zero.

    The adversarial images are those of one FGSM step on the same network, as in the paper. Images that it gets wrong
    stay as they are, which lowers every layer's figure in proportion.

    Args:
        model: the float network; stays as it is.
        images: float32 (n, ...) in [0, 1].
        labels: int64 (n,).
        threat: of the attack.
        batch_size: images per run of the attack.

    Raises:
        DataError, ModelError: as `qopt.attacks.predict` and `layer_activity`.
    """
    attack = FGSM(batch_size=batch_size)
    adversarial = attack(model, images, labels, threat, seed=0).adversarial
    activity = layer_activity(model, images, adversarial)
    return {layer: sides.output.amplification or 0.0 for layer, sides in activity.items()}
