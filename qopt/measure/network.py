"""Networks as classifiers of images in [0, 1]: a twin for gradients, an emitted file for the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.attacks import predict
from qopt.errors import UsageError
from qopt.runtime.session import Runner


@final
@dataclass(frozen=True)
class Normalisation:
    """``(x - mean) / std`` per channel, for networks whose normalisation lies outside; empty means none.

    Raises:
        UsageError: as many means as standard deviations are needed, all finite, the latter positive; and when called,
            one of each per channel of the images.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise UsageError(
                "mean and std need the same number of channels", where="--mean/--std",
                got=f"{len(self.mean)} and {len(self.std)}",
            )  # fmt: skip
        if not all(isfinite(m) for m in self.mean):
            raise UsageError("mean must be finite", where="--mean", got=str(self.mean))
        if not all(isfinite(s) and s > 0 for s in self.std):
            raise UsageError("std must be positive and finite", where="--std", got=str(self.std))

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, ...) in [0, 1] as the network takes them."""
        if not self.mean:
            return images
        if images.shape[1] != len(self.mean):
            raise UsageError(
                "one mean and std per channel", where="--mean/--std", expected=str(images.shape[1]),
                got=str(len(self.mean)),
            )  # fmt: skip
        shape = (1, -1, *[1] * (images.dim() - 2))
        return (images - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


@final
@dataclass(frozen=True, eq=False)
class TwinClassifier:
    """A twin as a `Classifier`: normalises, and splits the images where the graph takes one batch size only."""

    graph: GraphModule
    normalisation: Normalisation = Normalisation()
    batch: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, ...) float32 in [0, 1] to logits (n, classes); gradients flow."""
        inputs = self.normalisation(images)
        size = self.batch or len(inputs)
        return torch.cat([self._logits(chunk, size - len(chunk)) for chunk in torch.split(inputs, size)])

    def _logits(self, chunk: Tensor, missing: int) -> Tensor:
        padding = chunk[-1:].expand(missing, *chunk.shape[1:])
        logits: Tensor = self.graph(torch.cat([chunk, padding]) if missing else chunk)
        return logits[: len(chunk)]


@final
@dataclass(frozen=True, eq=False)
class ArtefactClassifier:
    """An emitted file in ONNX Runtime as a `Classifier` without gradients: what ships is what is judged."""

    runner: Runner
    normalisation: Normalisation = Normalisation()

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, ...) float32 in [0, 1] to logits (n, classes)."""
        return torch.from_numpy(self.runner(self.normalisation(images).numpy().astype(np.float32)))


def predictions(model: TwinClassifier | ArtefactClassifier, images: Tensor) -> Tensor:
    """The class of every image: int64 (n,)."""
    return predict(model, images).argmax(1)
