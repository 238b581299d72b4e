"""What passes through every layer: the range of its inputs and outputs, and how an attack grows on the way.

Error amplification is ``||A - A_adv||_2 / ||A||_2`` of Lin, Gan, Han 2019 (Defensive Quantization), eq. 4: the
activation A of a clean image against that of the adversarial image made from it. The paper shows it at the inputs of
layers; here it is known at the outputs, too, so that what a layer itself adds can be told from what comes after it.
The same ratio of one network's activations against another's of the same images is the error of a quantized network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.attacks.score import check_images
from qopt.errors import DataError, ModelError
from qopt.measure.network import TwinClassifier
from qopt.passes.nodes import is_layer
from qopt.passes.watcher import SideBySide
from qopt.quantize import whole_batches

BATCH = 32
"""Images per run, clean and as many adversarial ones, where the batch axis is dynamic."""


@final
@dataclass(frozen=True)
class Activity:
    """One side of a layer, over all its uses and all images, clean and adversarial.

    Attributes:
        low: the smallest value; ``high``: the largest.
        amplification: ``||A - A_adv||_2 / ||A||_2``, the mean over the images whose A is not zero; None where all are.
    """

    low: float
    high: float
    amplification: float | None


@final
@dataclass(frozen=True)
class LayerActivity:
    """What comes into a layer, and what it makes of it, its bias included."""

    input: Activity
    output: Activity


@torch.no_grad()
def layer_activity(
    model: TwinClassifier, clean: Tensor, adversarial: Tensor, other: TwinClassifier | None = None
) -> dict[str, LayerActivity]:
    """Layer name to its activity; a batch of clean images and the adversarial ones of them are in memory at once.

    An activation is taken apart into images where its first axis counts them, or is a multiple of their number; any
    other layout counts as one activation of the whole batch.

    Args:
        model: a float or quantized twin, its layers marked; stays as it is.
        clean: float32 (n, ...) in [0, 1]; where the graph takes one batch size only, a remainder is left out.
        adversarial: like ``clean``, each made from the image at its place.
        other: what looks at ``adversarial``, another twin of the same network; None for ``model`` itself.

    Raises:
        DataError: images that are none, or that do not pair up.
        ModelError: an activation that is not finite, naming the layer.
    """
    check_images(clean)
    check_images(adversarial)
    if clean.shape != adversarial.shape:
        raise DataError(
            "adversarial images that were not made of the clean ones", expected=str(tuple(clean.shape)),
            got=str(tuple(adversarial.shape)),
        )  # fmt: skip
    found: dict[str, tuple[_Tally, _Tally]] = {}
    pairs = [whole_batches(model.normalisation(images), model.batch) for images in (clean, adversarial)]
    size = model.batch or BATCH
    graphs = (model.graph, (other or model).graph)
    for batches in zip(torch.split(pairs[0], size), torch.split(pairs[1], size), strict=True):
        runs = (_Layers(graph, batch) for graph, batch in zip(graphs, batches, strict=True))
        for one, two in zip(*runs, strict=True):
            assert one.layer == two.layer, "twins of the same network have the same layers in the same order"
            sides = found.setdefault(one.layer, (_Tally(), _Tally()))
            sides[0].add(one.layer, one.input, two.input, len(batches[0]))
            sides[1].add(one.layer, one.output, two.output, len(batches[0]))
    return {layer: LayerActivity(*(tally.result() for tally in sides)) for layer, sides in found.items()}


@final
class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.total, self.count = 0.0, 0

    def add(self, layer: str, clean: Tensor, adversarial: Tensor, images: int) -> None:
        """Take in the activations of ``images`` images."""
        for values in (clean, adversarial):
            low, high = (float(end) for end in torch.aminmax(values))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ModelError(
                    "an activation that is not finite", where=layer, fix="look for overflow or bad weights"
                )
            self.low, self.high = min(self.low, low), max(self.high, high)
        rows = images if clean.ndim and len(clean) % images == 0 else 1
        plain = clean.double().reshape(rows, -1)
        sizes, moved = plain.norm(dim=1), (adversarial.double().reshape(rows, -1) - plain).norm(dim=1)
        alive = sizes > 0
        self.total += float((moved[alive] / sizes[alive]).sum()) * (images // rows)
        self.count += int(alive.sum()) * (images // rows)

    def result(self) -> Activity:
        return Activity(self.low, self.high, self.total / self.count if self.count else None)


@final
@dataclass(frozen=True, eq=False)
class _Use:
    """One use of a layer on a batch."""

    layer: str
    input: Tensor
    output: Tensor


@final
class _Layers(SideBySide):
    """Runs a batch, and stops at every use of a layer."""

    def __init__(self, graph: GraphModule, batch: Tensor) -> None:
        super().__init__(graph, (batch,))
        self._input = self._output = batch

    def __iter__(self) -> Iterator[_Use]:
        for node in self.graph.nodes:
            self.step(node)
            if is_layer(node):
                yield _Use(node.meta["layer"], self._input, self._output)

    def before(self, node: Node) -> None:
        self._input = self.arguments(node, self.environments[0])[0]

    def layer(self, node: Node, outputs: list[Tensor]) -> list[Tensor]:
        self._output = outputs[0]
        return outputs
