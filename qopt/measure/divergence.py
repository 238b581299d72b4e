"""How far a quantized network moves from the float one: the Kullback-Leibler divergence of their predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn import functional

from qopt.attacks import predict
from qopt.measure.network import ArtefactClassifier, TwinClassifier
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.quantize import Quantizer
from qopt.spec import WeightSpec

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
        found = log_probabilities(model, self.images)
        mean = functional.kl_div(found, self.reference, reduction="none", log_target=True).sum(1).mean()
        return min(max(float(mean), 0.0), LIMIT)


def log_probabilities(model: TwinClassifier | ArtefactClassifier, images: Tensor) -> Tensor:
    """float64 (n, classes); in float32, rounding alone would move a network by 1e-7 nats, as much as 8-bit weights."""
    return functional.log_softmax(predict(model, images).double(), 1)


def layer_sensitivities(
    quantizer: Quantizer, model: TwinClassifier, probe: Probe, candidates: Mapping[str, Sequence[WeightSpec]]
) -> dict[tuple[str, WeightSpec], float]:
    """Divergence caused by quantizing one layer alone, for every layer and each of its candidates.

    ``model`` is the float network over a private copy of `Quantizer.float_graph`: its weights are replaced one at a
    time and put back, also where a measurement raises.
    """
    nodes = {node.meta["layer"]: node for node in model.graph.graph.nodes if is_layer(node)}
    result: dict[tuple[str, WeightSpec], float] = {}
    for layer in quantizer.prepared.layers:
        weight = constant_of(model.graph, weight_source(nodes[layer.name]))
        for spec in candidates[layer.name]:
            with _replaced(weight, quantizer.quantized_weight(layer, spec).dequantize()):
                result[layer.name, spec] = probe.divergence(model)
    return result


@contextmanager
def _replaced(weight: Tensor, values: Tensor) -> Iterator[None]:
    kept = weight.clone()
    weight.copy_(values)
    try:
        yield
    finally:
        weight.copy_(kept)
