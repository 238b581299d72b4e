"""ZOO (Chen et al. 2017): Carlini and Wagner's attack in l2, with derivatives by finite differences of queries."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import check_options, check_positive
from qopt.attacks.queries import QUERIES, margins, right_before
from qopt.attacks.score import accuracy_vector
from qopt.errors import UsageError
from qopt.seeds import derive

DECAY, DECAY_OF_SQUARES, TINY = 0.9, 0.999, 1e-8
SMALLEST_H = 1e-6
"""Float32 resolves pixel values to 6e-8."""


@final
@dataclass(frozen=True)
class ZOO:
    """Coordinate descent on ``|a|^2 + c * max(log p_y - max_{j != y} log p_j, 0)``, with Adam for every pixel.

    In each step some pixels, drawn anew, are moved by ``h`` either way, inside the box; ``c`` is searched for image by
    image. Differences of ``h`` see nothing where rounding of activations hides them: compare with SPSA.

    The variable is the image itself, clipped to the box: in the variable of Carlini and Wagner, ``x = (tanh w + 1) /
    2``, black and white pixels hardly move. The defaults are those of Bernhard et al. 2019, whose learning rate of 0.1
    in w is at most 0.05 in x.

    Attributes:
        steps: of the descent, for every value of c.
        learning_rate: of Adam, in pixel values.
        constant: the first c.
        search_steps: values of c that are tried.
        coordinates: pixels moved in each step.
        h: half the distance of a difference, in pixel values.
        batch_size: evaluations per forward pass, which also bounds the memory.

    Raises:
        UsageError: an option is out of its range.
    """

    steps: int = 100
    learning_rate: float = 0.05
    constant: float = 0.9
    search_steps: int = 10
    coordinates: int = 128
    h: float = 1e-4
    batch_size: int = QUERIES

    def __post_init__(self) -> None:
        check_options(
            "ZOO", "margin", steps=self.steps, search_steps=self.search_steps, coordinates=self.coordinates,
            batch_size=self.batch_size,
        )  # fmt: skip
        check_positive("ZOO", learning_rate=self.learning_rate, constant=self.constant, h=self.h)
        if self.h < SMALLEST_H:
            raise UsageError("h is lost in the rounding of pixels", where="ZOO", expected=f"{SMALLEST_H:g} or larger")

    @property
    def name(self) -> str:
        """For example ``ZOO-10x100``: values of c, and steps for each."""
        return f"ZOO-{self.search_steps}x{self.steps}"

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int, indices: Tensor | None = None
    ) -> AttackResult:
        """The nearest examples in l2 that were found, for ``images`` (n, ...), float32 in [0, 1].

        It asks ``search_steps * (steps * (2 * coordinates + 1) + 1)`` queries for each image that the model gets right.
        The pixels drawn for an image depend on ``seed`` and its entry of ``indices`` only.

        Raises:
            DataError: the images, labels or indices do not fit.
            ModelError: the output is no finite matrix of logits.
        """
        labels, numbers, rows = right_before(model, images, labels, indices, self.batch_size)
        adversarial = images.detach().clone()
        for chunk in torch.split(rows, max(1, self.batch_size // (2 * self.coordinates))):
            draws = [np.random.default_rng(derive(seed, "zoo", numbers[row])) for row in chunk.tolist()]
            if draws:
                adversarial[chunk] = self._search(model, adversarial[chunk], labels[chunk], draws)
        fooled = ~accuracy_vector(model, adversarial, labels, self.batch_size)
        adversarial[~fooled] = images[~fooled]
        return AttackResult(adversarial, fooled)

    def _search(self, model: Classifier, clean: Tensor, labels: Tensor, draws: list[np.random.Generator]) -> Tensor:
        """The nearest fooling image of each of ``clean`` (k, ...) over all values of c, or else the clean one."""
        nearest = _Nearest(clean.clone(), torch.full(labels.shape, inf, dtype=torch.float64, device=clean.device))
        constant = torch.full_like(nearest.distortion, self.constant)
        low, high = torch.zeros_like(constant), torch.full_like(constant, inf)
        for _ in range(self.search_steps):
            found = self._descend(model, clean, labels, constant, draws, nearest)
            low, high = torch.where(found, low, constant), torch.where(found, constant, high)
            constant = torch.where(high.isinf(), 10 * constant, (low + high) / 2)
        return nearest.images

    def _descend(
        self,
        model: Classifier,
        clean: Tensor,
        labels: Tensor,
        constant: Tensor,
        draws: list[np.random.Generator],
        nearest: _Nearest,
    ) -> Tensor:
        """One descent from ``clean`` (k, ...) for ``constant`` (k,): whether each image was fooled on the way."""
        images, pixels = clean.clone(memory_format=torch.contiguous_format), clean[0].numel()
        flat, origin = images.flatten(1), clean.flatten(1)  # flat is a view
        adam = torch.zeros(3, *flat.shape, dtype=torch.float64, device=clean.device)
        found = self._look(model, images, clean, labels, nearest)
        for _ in range(self.steps):
            count = min(self.coordinates, pixels)
            drawn = np.stack([draw.choice(pixels, count, replace=False) for draw in draws])
            chosen = torch.from_numpy(drawn).to(clean.device)
            there = flat.gather(1, chosen).double()
            slopes = self._slopes(model, images, labels, chosen)
            gradient = 2 * (there - origin.gather(1, chosen)) - constant[:, None] * slopes
            there -= self.learning_rate * _adam(adam, chosen, gradient)
            flat.scatter_(1, chosen, there.clamp_(0, 1).to(flat.dtype))
            found |= self._look(model, images, clean, labels, nearest)
        return found

    def _look(self, model: Classifier, images: Tensor, clean: Tensor, labels: Tensor, nearest: _Nearest) -> Tensor:
        """Bool (k,): which of ``images`` (k, ...) fool; the nearest of them are kept."""
        fooling = margins(model, images[:, None], labels, self.batch_size)[:, 0] > 0
        nearest.keep(images, (images - clean).double().flatten(1).square().sum(1), fooling)
        return fooling

    def _slopes(self, model: Classifier, images: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        """Derivatives, float64 (k, q), of ``min(margin, 0)`` by the pixels ``chosen`` (k, q) of ``images`` (k, ...)."""
        parts = []
        for part in torch.split(chosen, max(1, self.batch_size // (2 * len(images))), dim=1):
            count = part.shape[1]
            queries = images.flatten(1)[:, None].repeat(1, 2 * count, 1)
            pixels = torch.cat([part, part], 1)[..., None]
            moved = queries.gather(2, pixels)
            moved[:, :count] += self.h
            moved[:, count:] -= self.h
            moved.clamp_(0, 1)
            queries.scatter_(2, pixels, moved)
            values = margins(
                model, queries.reshape(len(images), -1, *images.shape[1:]), labels, self.batch_size
            ).clamp_(max=0)
            # Over the distance that float32 and the box have left of 2 h.
            ahead, behind = moved.squeeze(2).double().chunk(2, dim=1)
            parts.append((values[:, :count] - values[:, count:]) / (ahead - behind))
        return torch.cat(parts, 1)


@final
@dataclass(eq=False)
class _Nearest:
    """The nearest fooling images so far, (k, ...), and their squared l2 distortions, float64 (k,); inf where none."""

    images: Tensor
    distortion: Tensor

    def keep(self, images: Tensor, distortion: Tensor, fooling: Tensor) -> None:
        better = fooling & (distortion < self.distortion)
        self.images[better], self.distortion[better] = images[better], distortion[better]


def _adam(state: Tensor, chosen: Tensor, gradient: Tensor) -> Tensor:
    """Adam's step, over the learning rate, for the pixels ``chosen`` (k, q); every pixel counts its own updates.

    ``state`` (3, k, pixels) holds means, means of squares and counts, and is brought up to date.
    """
    mean = DECAY * state[0].gather(1, chosen) + (1 - DECAY) * gradient
    square = DECAY_OF_SQUARES * state[1].gather(1, chosen) + (1 - DECAY_OF_SQUARES) * gradient**2
    count = state[2].gather(1, chosen) + 1
    for kept, values in zip(state, (mean, square, count), strict=True):
        kept.scatter_(1, chosen, values)
    spread = (square / (1 - DECAY_OF_SQUARES**count)).sqrt()
    return mean / (1 - DECAY**count) / (spread + TINY)
