"""What quantizing one layer alone does to the loss of the network, on clean images and on adversarial ones.

The *robust* loss is that of every image as hard as the float network withstands it: in its adversarial form where the
float network gets that right, else clean. It is what a plan can keep. On images that fool the float network already,
any change of the network lowers the loss, because they were made for another one; that is no merit (`adversarial`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from qopt.attacks import predict
from qopt.attacks.score import check_labels
from qopt.errors import DataError
from qopt.measure.network import TwinClassifier
from qopt.measure.sensitivity import version_logits
from qopt.quantize import Quantizer
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class FloatLoss:
    """Mean cross-entropy of the float network in nats, of the three kinds of `LossChange`."""

    clean: float
    adversarial: float
    robust: float


@final
@dataclass(frozen=True)
class LossChange:
    """What one layer in one format changes against the float network, in nats.

    Attributes:
        clean: mean cross-entropy on clean images.
        adversarial: the same on all adversarial images.
        robust: the same on images as hard as the float network withstands them.
        robust_error: the standard error of ``robust`` over images.
        divergence: mean Kullback-Leibler divergence ``KL(float || quantized)`` on the images of ``robust``, which is
            what searches minimise.
    """

    clean: float
    adversarial: float
    robust: float
    robust_error: float
    divergence: float


def loss_changes(
    quantizer: Quantizer,
    model: TwinClassifier,
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    candidates: Mapping[str, Sequence[WeightSpec]],
) -> tuple[FloatLoss, dict[tuple[str, WeightSpec], LossChange]]:
    """The loss of the float network, and what each layer in each of its candidates changes, the others in float.

    Args:
        quantizer: rounds to nearest.
        model: the float network over `Quantizer.float_graph`; stays as it is.
        clean: float32 (n, ...) in [0, 1].
        adversarial: like ``clean``, made from the images at the same places to fool the float network.
        labels: int64 (n,).
        candidates: layer name to formats.

    Raises:
        DataError, ModelError: as `qopt.attacks.predict`; DataError for images or labels that do not pair up.
    """
    if clean.shape != adversarial.shape:
        raise DataError("clean and adversarial images that do not pair up", got=f"{len(clean)} and {len(adversarial)}")
    images = torch.cat([clean, adversarial])
    floats = functional.log_softmax(predict(model, images).double(), 1)
    twice = check_labels(labels, len(clean), floats.shape[1]).repeat(2)
    layers = {layer.name: layer for layer in quantizer.prepared.layers}

    def versions(name: str) -> Iterator[Tensor]:
        return (quantizer.quantized_weight(layers[name], spec).dequantize() for spec in candidates[name])

    found: dict[tuple[str, WeightSpec], list[Tensor]] = {
        (name, spec): [] for name in layers for spec in candidates[name]
    }
    for layer, number, start, logits in version_logits(model, images, versions):
        here = slice(start, start + len(logits))
        own = functional.log_softmax(logits.double(), 1)
        change = functional.nll_loss(own, twice[here], reduction="none")
        change = change - functional.nll_loss(floats[here], twice[here], reduction="none")
        kl = functional.kl_div(own, floats[here], reduction="none", log_target=True).sum(1)
        found[layer, candidates[layer][number]].append(torch.stack([change, kl]))
    held = floats[len(clean) :].argmax(1) == twice[: len(clean)]
    before = _kinds(functional.nll_loss(floats, twice, reduction="none"), held)
    changes = {pair: _change(torch.cat(parts, 1), held) for pair, parts in found.items()}
    return FloatLoss(*(float(kind.mean()) for kind in before)), changes


def _kinds(values: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From (2 n,), clean images first: those of the clean, of the adversarial, and of the hardest withstood images."""
    clean, adversarial = values.view(2, -1)
    return clean, adversarial, torch.where(held, adversarial, clean)


def _change(values: Tensor, held: Tensor) -> LossChange:
    """From changes of the loss and divergences, (2, 2 n)."""
    clean, adversarial, robust = _kinds(values[0], held)
    error = float(robust.std(correction=1)) / math.sqrt(len(robust)) if len(robust) > 1 else 0.0
    divergence = max(float(_kinds(values[1], held)[2].mean()), 0.0)
    return LossChange(float(clean.mean()), float(adversarial.mean()), float(robust.mean()), error, divergence)
