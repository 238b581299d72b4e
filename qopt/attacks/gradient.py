"""The core of all attacks by gradient ascent: its options, and the loop over the images that are not done yet."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import Ball, Start, direction, mean_length_one, start
from qopt.attacks.input_gradients import input_gradient, reached, reached_and_gradient, unusable
from qopt.attacks.losses import LOSSES, Goal, LossName, Misclassified, cross_entropy, dlr, margin
from qopt.attacks.score import BATCH_SIZE, check_labels, predict
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel

__all__ = [
    "LOSSES", "Ascent", "LossName", "aim", "ascend", "check_indices", "check_options", "check_positive", "climb",
    "cross_entropy", "dlr", "input_gradient", "margin", "unusable",
]  # fmt: skip

HELD = 8
"""Batches whose images are worked on together: as images leave, the rest still fills whole batches."""


@final
@dataclass(frozen=True)
class Ascent:
    """Options of projected gradient ascent.

    Attributes:
        steps: gradient steps of each run, at least 1.
        step: their length in the norm of the threat model, larger than 0.
        loss: what the steps raise.
        start: where a run starts: ``clean``, ``ball`` (anywhere in it) or ``halfway`` out.
        restarts: runs from different random starts, at least 1; more than 1 needs one.
        decay: share of the summed gradients that the next step keeps (momentum), 0 or larger; None for none at all.
        compact: an image leaves as soon as it is fooled. Otherwise every run takes all its steps, and the last fooling
            image is returned: what mean distortions in the literature describe, and what transfers to other models.
        batch_size: images per forward pass.
    """

    steps: int
    step: float
    loss: LossName = "cross_entropy"
    start: Start = "clean"
    restarts: int = 1
    decay: float | None = None
    compact: bool = True
    batch_size: int = BATCH_SIZE


def check_options(attack: str, loss: str, **counts: int) -> None:
    """Raise UsageError unless ``loss`` is known and every one of ``counts`` is at least 1; ``attack`` is at fault."""
    if loss not in LOSSES:
        raise UsageError("unknown loss", where=attack, expected=" or ".join(LOSSES), got=repr(loss))
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"{option} must be a whole number, 1 or larger", where=attack, got=repr(count))


def check_positive(attack: str, **numbers: float | None) -> None:
    """Raise UsageError unless every one of ``numbers`` is finite and larger than 0, or None; ``attack`` is at fault."""
    for option, number in numbers.items():
        if number is not None and not (isfinite(number) and number > 0):
            raise UsageError(f"{option} must be a finite number larger than 0", where=attack, got=repr(number))


def check_indices(indices: Tensor | None, n: int) -> Tensor:
    """The images' numbers (n,), by default 0..n-1; raises DataError where they are not one per image."""
    numbers = torch.arange(n) if indices is None else indices
    if numbers.shape != (n,):
        raise DataError("indices must number the images", expected=f"{n}", got=f"{tuple(numbers.shape)}")
    return numbers


def ascend(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    options: Ascent,
    *,
    seed: int,
    indices: Tensor | None,
    targets: Tensor | None = None,
) -> AttackResult:
    """Attack ``images`` (n, ...), float32 in [0, 1], with ``labels`` (n,), within ``threat``.

    With ``targets`` (n,), classes, the loss towards them is raised, and an image is fooled where the prediction is its
    target. Images that are fooled from the start are returned as they are, and so is everything at eps = 0.
    ``fooled`` is what `predict` says of the returned images, whatever happened on the way; of those that were not
    attacked it has said so already. Parameters of the model are not touched. The result depends on ``batch_size`` only
    through the rounding of the model's own arithmetic.

    Raises:
        DataError: images, labels, targets or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    logits = predict(model, images, options.batch_size)
    goal = aim(labels, targets, logits, options.loss)
    numbers = check_indices(indices, len(images))
    fooled = goal.reached(logits)
    rows = (~fooled).nonzero().flatten()
    adversarial = climb(model, images, rows, goal, threat, options, seed=seed, numbers=numbers)
    if len(rows):
        fooled[rows] = goal.at(rows).reached(predict(model, adversarial[rows], options.batch_size))
    return AttackResult(adversarial, fooled)


def aim(labels: Tensor, targets: Tensor | None, logits: Tensor, loss: LossName = "margin") -> Misclassified:
    """The goal of an attack on images with ``logits`` (n, classes) on the clean ones.

    Raises:
        DataError: labels or targets do not fit.
    """
    labels = check_labels(labels, *logits.shape)
    if targets is None:
        return Misclassified(labels, loss)
    return Misclassified(check_labels(targets, *logits.shape), loss, targeted=True)


def climb(
    model: Classifier,
    images: Tensor,
    rows: Tensor,
    goal: Goal,
    threat: ThreatModel,
    options: Ascent,
    *,
    seed: int,
    numbers: Tensor,
) -> Tensor:
    """``images`` (n, ...) with those named in ``rows`` (m,) replaced by what the attack makes of them.

    That is the last image on the way that reached the goal, or else the one at which the last run ended. ``goal`` and
    ``numbers`` are about all n images.
    """
    with torch.inference_mode(False):  # under a caller's inference mode there would be no gradients, silently
        adversarial = images.detach().clone()
        if threat.eps > 0:
            for part in torch.split(rows, HELD * options.batch_size):
                own = numbers[part.to(numbers.device)]
                clean = _Clean(adversarial[part], own, threat, seed, options)
                adversarial[part] = _attack(model, clean, goal.at(part.clone()))
    return adversarial


@final
@dataclass(frozen=True, eq=False)
class _Clean:
    """Clean images and what their runs start from."""

    images: Tensor
    numbers: Tensor
    threat: ThreatModel
    seed: int
    options: Ascent

    def starts(self, rows: Tensor, restart: int) -> Tensor:
        numbers = self.numbers[rows.to(self.numbers.device)]
        clean = self.images[rows]
        return start(self.options.start, clean, self.threat, seed=self.seed, indices=numbers, restart=restart)


def _attack(model: Classifier, clean: _Clean, goal: Goal) -> Tensor:
    """All restarts on images that have not reached their goal; returns the adversarial images."""
    options = clean.options
    best = clean.images.clone()
    done = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    for restart in range(options.restarts):
        rows = (~done).nonzero().flatten() if options.compact else torch.arange(len(done), device=done.device)
        if not len(rows):
            break
        around = Ball.around(clean.images[rows], clean.threat)
        run = _Run.begin(clean.starts(rows, restart), around, goal.at(rows), options)
        run.climb(model, options, ask=not options.compact or restart < options.restarts - 1)
        taken = run.done | ~done[rows]
        best[rows[taken]] = run.result[taken]
        done[rows] |= run.done
    return best


@final
@dataclass(eq=False)
class _Run:
    """One run on n images, of which m are still ``active``.

    Attributes:
        result: of all n the last image that reached the goal, or else the last one; ``done``: whether it did.
        active: which these are, (m,).
        images: where they are, in the ``ball`` and with the ``goal`` of each.
        pushed: the sum of their gradients, or None.
    """

    result: Tensor
    done: Tensor
    active: Tensor
    images: Tensor
    ball: Ball
    goal: Goal
    pushed: Tensor | None

    @staticmethod
    def begin(images: Tensor, ball: Ball, goal: Goal, options: Ascent) -> _Run:
        active = torch.arange(len(images), device=images.device)
        pushed = None if options.decay is None else torch.zeros_like(images)
        return _Run(images.clone(), torch.zeros_like(active, dtype=torch.bool), active, images, ball, goal, pushed)

    def climb(self, model: Classifier, options: Ascent, *, ask: bool) -> None:
        """All steps; ``ask``: whether the last one reached the goal is to be known."""
        for _ in range(options.steps):
            found, gradient = reached_and_gradient(
                model, self.images, self.goal, options.batch_size, compact=options.compact
            )
            self._note(found)
            gradient = self._with_momentum(gradient, options)
            # Without a gradient an image stays where it is for ever, so it need not be asked again.
            going = gradient.flatten(1).abs().amax(1) > 0
            if options.compact:
                going &= ~found
            if not going.all():
                gradient = self._keep(going, gradient)
            if not len(self.active):
                return
            step = direction(gradient, self.images, self.ball.threat.norm)
            self.images = self.ball.project(self.images.add(step, alpha=options.step))
        if ask:
            self._note(reached(model, self.images, self.goal, options.batch_size))
        self._settle(torch.ones_like(self.active, dtype=torch.bool))

    def _note(self, found: Tensor) -> None:
        rows = self.active[found]
        self.result[rows] = self.images[found]
        self.done[rows] = True

    def _settle(self, which: Tensor) -> None:
        """Those among ``which`` that never reached the goal end where they are."""
        missed = which & ~self.done[self.active]
        self.result[self.active[missed]] = self.images[missed]

    def _keep(self, going: Tensor, gradient: Tensor) -> Tensor:
        self._settle(~going)
        rows = going.nonzero().flatten()
        self.images, self.active = self.images.index_select(0, rows), self.active[rows]
        self.ball, self.goal = self.ball.at(rows), self.goal.at(rows)
        self.pushed = None if self.pushed is None else self.pushed.index_select(0, rows)
        return gradient.index_select(0, rows)

    def _with_momentum(self, gradient: Tensor, options: Ascent) -> Tensor:
        if self.pushed is None or options.decay is None:
            return gradient
        self.pushed = mean_length_one(gradient).add_(self.pushed, alpha=options.decay)
        return self.pushed
