"""Errors along the network: what the attack, and what quantization, does to the output of every layer."""

from __future__ import annotations

from torch import Tensor

from qopt.measure.amplification import layer_activity
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.report.model import ErrorAmplification, LayerErrors


def errors_along(
    plain: TwinClassifier, chosen: TwinClassifier, clean: Tensor, adversarial: Tensor | None
) -> ErrorAmplification:
    """Of the first ``clean`` images and of the adversarial ones made from them on the float network ``plain``.

    ``chosen`` is that network quantized; without ``adversarial`` only its error on clean images is known.
    """
    batch = plain.batch or 1
    count = max(BATCH // batch, 1) * batch
    clean = clean[: min(count, len(clean) // batch * batch or count)]
    columns = {"clean": _outputs(plain, clean, clean, chosen)}
    if adversarial is not None:
        adversarial = adversarial[: len(clean)]
        columns["attack_float"] = _outputs(plain, clean, adversarial)
        columns["attack"] = _outputs(chosen, clean, adversarial)
        columns["attacked"] = _outputs(plain, adversarial, adversarial, chosen)
    names = ("attack_float", "attack", "clean", "attacked")
    return ErrorAmplification(
        images=len(clean),
        layers=[
            LayerErrors(layer=layer, **{name: columns.get(name, {}).get(layer) for name in names})
            for layer in columns["clean"]
        ],
    )


def _outputs(
    model: TwinClassifier, first: Tensor, second: Tensor, other: TwinClassifier | None = None
) -> dict[str, float | None]:
    found = layer_activity(model, first, second, other)
    ratios = {layer: activity.output.amplification for layer, activity in found.items()}
    return {layer: None if ratio is None else round(ratio, 6) for layer, ratio in ratios.items()}
