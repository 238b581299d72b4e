"""The Square attack (Andriushchenko et al. 2020): random search by queries alone, linf and l2."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.batches import Held, answers, attack_right
from qopt.attacks.gradient import LOSSES
from qopt.attacks.square_moves import MOVES
from qopt.errors import UsageError
from qopt.seeds import derive
from qopt.threat import ThreatModel

BATCH = 128
"""Images per forward pass where the caller does not say; there are no gradients to keep."""
AHEAD = 200
"""Queries whose chance is drawn at once for every image."""
SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries of 10000 after which the share of the pixels that one query changes is halved (section 4.1)."""


@final
@dataclass(frozen=True)
class Square:
    """Changes one random square of each image at a time, and keeps what lowers the lead of the label.

    Only logits are asked for, so the model may be any callable: a file in ONNX Runtime, for instance.

    Attributes:
        queries: changes tried on each image after the first; the schedule is rescaled to them.
        share: share of the pixels that the first changes cover, in (0, 1] (p).
        batch_size: images per query.

    Raises:
        UsageError: an option is out of its range.
    """

    queries: int = 5000
    share: float = 0.8
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        for option in ("queries", "batch_size"):
            if getattr(self, option) < 1:
                raise UsageError(
                    f"{option} must be a whole number, 1 or larger", where="Square", got=repr(getattr(self, option))
                )
        if not 0 < self.share <= 1:
            raise UsageError("share must lie in (0, 1]", where="Square", got=repr(self.share))

    @property
    def name(self) -> str:
        """``Square``; with the queries where they are not 5000."""
        return "Square" if self.queries == 5000 else f"Square-{self.queries}"

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, c, h, w), float32 in [0, 1]; the search depends on ``seed`` and ``indices`` only.

        Images of other shapes (n, ..., h, w) have their planes counted as channels, and vectors (n, w) are one row of
        pixels. Of images that were not fooled, the point with the smallest lead is returned.
        """

        def attack(held: Held) -> Tensor:
            return _search(model, held, threat, seed, self) if threat.eps > 0 else held.images

        return attack_right(model, images, labels, indices, self.batch_size, attack)

    def side(self, query: int, height: int, width: int) -> int:
        """The side of the squares of a query (from 0) on images of height x width, in pixels, at least 1."""
        halvings = sum(query / self.queries * 10000 > at for at in SCHEDULE)
        return max(round(sqrt(self.share / 2**halvings * height * width)), 1)


@final
@dataclass(eq=False)
class _State:
    """Images of one search that are not fooled yet, as planes (n, c, h, w), and the smallest lead of the label (n,)."""

    rows: Tensor
    labels: Tensor
    clean: Tensor
    best: Tensor
    lead: Tensor

    def offer(self, candidates: Tensor, lead: Tensor) -> None:
        """Take the candidates whose lead is smaller."""
        better = (lead < self.lead).nonzero().flatten()
        self.best[better] = candidates[better]
        self.lead[better] = lead[better]

    def keep(self, kept: Tensor) -> None:
        self.rows, self.labels, self.clean, self.best, self.lead = (
            tensor[kept] for tensor in (self.rows, self.labels, self.clean, self.best, self.lead)
        )


def _search(model: Classifier, held: Held, threat: ThreatModel, seed: int, options: Square) -> Tensor:
    """The attack on the images held; returns the adversarial images."""
    clean = held.images.reshape(len(held.images), -1, *(1, *held.images.shape[1:])[-2:])
    moves, planes = MOVES[threat.norm], clean.shape[1:]
    chance = _Chance(held.numbers.tolist(), seed, moves.chance(planes[0]), clean)
    adversarial = clean.clone()
    state = _State(
        torch.arange(len(clean), device=clean.device), held.labels, clean, clean.clone(),
        torch.full_like(held.logits[:, 0], inf, dtype=torch.float64),
    )  # fmt: skip
    for query in range(-1, options.queries):
        if query < 0:
            candidates = moves.first(clean, chance.draw(moves.first_chance(*planes)), threat.eps)
        else:
            side = options.side(query, *planes[1:])
            candidates = moves.change(state.clean, state.best, chance.at(query, state.rows), side, threat.eps)
        logits = answers(model, candidates.reshape(-1, *held.images.shape[1:]), options.batch_size).double()
        state.offer(candidates, -LOSSES["margin"](logits, state.labels))
        fooled = logits.argmax(1) != state.labels
        if fooled.any():
            adversarial[state.rows[fooled]] = candidates[fooled]
            state.keep(~fooled)
            if not len(state.rows):
                break
    adversarial[state.rows] = state.best
    return adversarial.view_as(held.images)


@final
class _Chance:
    """Numbers uniform in [0, 1) for each image, from its own generator: no image changes another one's."""

    def __init__(self, numbers: list[int], seed: int, width: int, like: Tensor) -> None:
        self._generators = [torch.Generator().manual_seed(derive(seed, "square", number)) for number in numbers]
        self._like, self._ahead = like, torch.zeros(len(numbers), AHEAD, width)

    def draw(self, count: int) -> Tensor:
        """The next (n, count) numbers of all images."""
        rows = [torch.rand(count, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._like)

    def at(self, query: int, rows: Tensor) -> Tensor:
        """The numbers (k, width) of a query for ``rows`` (k,) of the images; queries come in order, rows only leave."""
        if query % AHEAD == 0:
            for row in rows.tolist():
                self._ahead[row].uniform_(generator=self._generators[row])
        return self._ahead[rows.to(self._ahead.device), query % AHEAD].to(self._like)
