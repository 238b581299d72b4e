"""How far a quantized network moves from the float one: the Kullback-Leibler divergence of their predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from qopt.attacks import predict
from qopt.measure.network import ArtefactClassifier, TwinClassifier
from qopt.measure.sensitivity import tensor_logits, version_logits
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

LIMIT = 1e4
"""No divergence counts for more than this, so that sums over layers stay finite and comparable."""


@final
@dataclass(frozen=True, eq=False)
class Probe:
    """Images with the float network's log-probabilities on them: what quantized networks are held against.

    Attributes:
        images: float32 (n, ...) in [0, 1]; clean, adversarial or both.
        reference: float64 (n, classes), log-probabilities of the float network.
    """

    images: Tensor
    reference: Tensor

    @staticmethod
    def of(model: TwinClassifier, images: Tensor) -> Probe:
        """Probe with the float network ``model``."""
        return Probe(images, log_probabilities(model, images))

    def divergence(self, model: TwinClassifier | ArtefactClassifier) -> float:
        """Mean over images of ``KL(float || quantized)`` in nats, in [0, LIMIT]."""
        return _mean(_divergences(log_probabilities(model, self.images), self.reference))


def log_probabilities(model: TwinClassifier | ArtefactClassifier, images: Tensor) -> Tensor:
    """float64 (n, classes); in float32, rounding alone would move a network by 1e-7 nats, as much as 8-bit weights."""
    return _normalised(predict(model, images))


def layer_sensitivities(
    quantizer: Quantizer, model: TwinClassifier, probe: Probe, candidates: Mapping[str, Sequence[WeightSpec]]
) -> dict[tuple[str, WeightSpec], float]:
    """Divergence caused by quantizing one layer alone, for every layer and each of its candidates.

    ``model`` is the float network, over `Quantizer.float_graph` or a copy of it; it stays as it is.
    """
    layers = {layer.name: layer for layer in quantizer.prepared.layers}
    found: dict[tuple[str, WeightSpec], list[Tensor]] = {(name, s): [] for name in layers for s in candidates[name]}

    def versions(name: str) -> Iterator[Tensor]:
        return (quantizer.quantized_weight(layers[name], spec).dequantize() for spec in candidates[name])

    for layer, number, start, logits in version_logits(model, probe.images, versions):
        reference = probe.reference[start : start + len(logits)]
        found[layer, candidates[layer][number]].append(_divergences(_normalised(logits), reference))
    return {pair: _mean(torch.cat(parts)) for pair, parts in found.items()}


def tensor_sensitivities(
    quantizer: Quantizer, model: TwinClassifier, probe: Probe, candidates: Mapping[str, Sequence[ActivationSpec]]
) -> dict[tuple[str, ActivationSpec], float]:
    """Divergence caused by quantizing one tensor of activations alone, for every tensor and each of its candidates.

    ``model`` as in `layer_sensitivities`. A float format has none.

    Raises:
        PlanError: nothing to calibrate ranges on.
    """
    found: dict[tuple[str, ActivationSpec], list[Tensor]] = {}
    versions = {name: [quantizer.activation(name, spec) for spec in specs] for name, specs in candidates.items()}
    for name, number, start, logits in tensor_logits(model, probe.images, versions):
        reference = probe.reference[start : start + len(logits)]
        found.setdefault((name, candidates[name][number]), []).append(_divergences(_normalised(logits), reference))
    return {pair: _mean(torch.cat(parts)) for pair, parts in found.items()}


def _normalised(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.double(), 1)


def _divergences(found: Tensor, reference: Tensor) -> Tensor:
    return functional.kl_div(found, reference, reduction="none", log_target=True).sum(1)


def _mean(divergences: Tensor) -> float:
    return min(max(float(divergences.mean()), 0.0), LIMIT)
