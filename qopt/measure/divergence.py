"""How far a quantized network moves from the float one: the Kullback-Leibler divergence of their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn import functional

from qopt.attacks import predict
from qopt.measure.network import TwinClassifier
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.quantize import Quantizer
from qopt.spec import WeightSpec

LIMIT = 1e4
"""A divergence that overflows counts as this."""


@final
@dataclass(frozen=True, eq=False)
class Probe:
    """Images with the float network's log-probabilities on them: what quantized networks are held against.

    Attributes:
        images: float32 (n, ...) in [0, 1]; clean, adversarial or both.
        reference: float32 (n, classes), log-probabilities of the float network.
    """

    images: Tensor
    reference: Tensor

    @staticmethod
    def of(model: TwinClassifier, images: Tensor) -> Probe:
        """Probe with the float network ``model``."""
        return Probe(images, functional.log_softmax(predict(model, images), 1))

    def divergence(self, model: TwinClassifier) -> float:
        """Mean over images of ``KL(float || quantized)`` in nats, in [0, LIMIT]."""
        logits = predict(model, self.images)
        rows = functional.kl_div(functional.log_softmax(logits, 1), self.reference, reduction="none", log_target=True)
        return min(max(float(rows.double().sum(1).mean()), 0.0), LIMIT)


def layer_sensitivities(
    quantizer: Quantizer, model: TwinClassifier, probe: Probe, candidates: Mapping[str, Sequence[WeightSpec]]
) -> dict[tuple[str, WeightSpec], float]:
    """Divergence caused by quantizing one layer alone, for every layer and each of its candidates.

    ``model`` is the float network over a private copy of the float graph: its weights are replaced one at a time and
    put back.
    """
    nodes = {node.meta["layer"]: node for node in model.graph.graph.nodes if is_layer(node)}
    result: dict[tuple[str, WeightSpec], float] = {}
    for layer in quantizer.prepared.layers:
        weight = constant_of(model.graph, weight_source(nodes[layer.name]))
        kept = weight.clone()
        for spec in candidates[layer.name]:
            weight.copy_(quantizer.quantized_weight(layer, spec).dequantize())
            result[layer.name, spec] = probe.divergence(model)
        weight.copy_(kept)
    return result
