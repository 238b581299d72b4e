"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness", Algorithm 1), linf and l2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal, final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import direction, project, random_start
from qopt.attacks.batches import Held, attack_right, likely_classes, slices
from qopt.attacks.gradient import LOSSES, input_gradient, unusable
from qopt.attacks.score import BATCH_SIZE
from qopt.errors import UsageError
from qopt.threat import ThreatModel

ApgdLoss = Literal["cross_entropy", "dlr"]
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (n, classes), labels (n,) and target classes (n,) to the values to raise, (n,)."""

MOMENTUM = 0.75
"""Share of the gradient step; the rest is the step before (alpha of Algorithm 1)."""
RISES = 0.75
"""The step is halved where at most this share of the steps since the last checkpoint raised the loss (rho)."""
FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06
"""The first interval between checkpoints, by how much each is shorter than the one before, and the shortest: shares of
all steps (section 3.1)."""


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Lead of ``targets`` (n,) on ``labels`` (n,) over a spread of the logits (n, classes): (n,), equation 7.

    The spread is ``z_1 - (z_3 + z_4) / 2`` of the sorted logits; of three classes ``z_1 - z_3``; two have none, and the
    lead is left as it is.
    """
    lead = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < 3:
        return lead
    largest = logits.topk(min(logits.shape[1], 4), dim=1).values
    return lead / (largest[:, 0] - largest[:, 2:].mean(1) + 1e-12)


_UNTARGETED: Mapping[ApgdLoss, Objective] = MappingProxyType(
    {
        # The log-odds rise exactly where cross-entropy does, and APGD looks at nothing but rises and directions.
        "cross_entropy": lambda logits, labels, _: LOSSES["cross_entropy"](logits, labels),
        "dlr": lambda logits, labels, _: LOSSES["dlr"](logits, labels),
    }
)


@final
@dataclass(frozen=True)
class APGD:
    """Gradient steps with momentum whose length starts at 2 eps and is halved, image by image, where progress ends.

    Attributes:
        loss: cross_entropy, or dlr, which is blind to shifts and scales of the logits.
        steps: gradient steps of each run.
        restarts: runs from different random starts.
        targets: runs towards each of so many most likely other classes (at most all of them), with the targeted dlr;
            0 for untargeted runs.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range, or targets are asked for with another loss than dlr.
    """

    loss: ApgdLoss = "cross_entropy"
    steps: int = 100
    restarts: int = 1
    targets: int = 0
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if self.loss not in _UNTARGETED:
            raise UsageError("unknown loss", where="APGD", expected=" or ".join(_UNTARGETED), got=repr(self.loss))
        for option, least in (("steps", 1), ("restarts", 1), ("targets", 0), ("batch_size", 1)):
            if getattr(self, option) < least:
                raise UsageError(
                    f"{option} must be a whole number, {least} or larger", where="APGD", got=repr(getattr(self, option))
                )
        if self.targets and self.loss != "dlr":
            raise UsageError("only dlr takes targets", where="APGD", got=repr(self.loss), fix="use loss='dlr'")

    @property
    def name(self) -> str:
        """``APGD-CE``, ``APGD-DLR`` or ``APGD-T``; with steps and restarts where they are not 100 and 1."""
        kind = "T" if self.targets else {"cross_entropy": "CE", "dlr": "DLR"}[self.loss]
        runs = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"APGD-{kind}" + (f"-{self.steps}{runs}" if runs or self.steps != 100 else "")

    @property
    def objective(self) -> Objective:
        """What the steps raise."""
        return targeted_dlr if self.targets else _UNTARGETED[self.loss]

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
        """Attack ``images`` (n, ...), float32 in [0, 1]; the random starts depend on ``seed`` and ``indices`` only.

        Fooled images leave at once; of the others the point of the highest loss is returned.
        """

        def attack(held: Held) -> Tensor:
            return _runs(model, held, threat, seed, self) if threat.eps > 0 else held.images

        return attack_right(model, images, labels, indices, self.batch_size, attack)


def checkpoints(steps: int) -> dict[int, int]:
    """The numbers of steps after which the step length is looked at, and the steps since the one before."""
    interval, shorter, shortest = (max(int(share * steps), 1) for share in (FIRST, SHORTER, SHORTEST))
    found, at = {}, interval
    while at <= steps:
        found[at] = interval
        interval = max(interval - shorter, shortest)
        at += interval
    return found


def _runs(model: Classifier, held: Held, threat: ThreatModel, seed: int, options: APGD) -> Tensor:
    """All targets and restarts on the images held, each on what is left of it; returns the adversarial images."""
    adversarial = held.images.clone()
    left = torch.arange(len(adversarial), device=adversarial.device)
    classes = likely_classes(held.logits, held.labels, max(options.targets, 1))
    runs = [(column, restart) for column in range(classes.shape[1]) for restart in range(options.restarts)]
    for number, (column, _) in enumerate(runs):
        part = held.rows(left)
        start = random_start(part.images, threat, seed=seed, indices=part.numbers, restart=number)
        found, fooled = _run(model, part, start, classes[left, column], threat, options)
        adversarial[left] = found
        left = left[~fooled]
        if not len(left):
            break
    return adversarial


@final
@dataclass(eq=False)
class _State:
    """One run's images that are still going, one row each.

    ``rows`` says where they came from, ``previous`` where they were a step ago; ``best`` is the point of the highest
    loss so far; ``rises`` counts the steps since the last checkpoint that raised the loss, ``halved`` says whether that
    checkpoint halved the step, and ``checked_loss`` is the highest loss at it.
    """

    rows: Tensor
    clean: Tensor
    labels: Tensor
    targets: Tensor
    step: Tensor
    previous: Tensor
    images: Tensor
    gradient: Tensor
    loss: Tensor
    best_images: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    checked_loss: Tensor
    rises: Tensor
    halved: Tensor

    def keep(self, kept: Tensor) -> None:
        """Drop the images that ``kept``, bool (n,), does not name."""
        if not kept.all():
            for field in fields(self):
                setattr(self, field.name, getattr(self, field.name)[kept])


def _run(
    model: Classifier,
    part: Held,
    start: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    options: APGD,
) -> tuple[Tensor, Tensor]:
    """One run from ``start``: each image's fooling point, or else that of the highest loss, and whether it fooled."""
    found, fooled = start.clone(), torch.zeros_like(part.labels, dtype=torch.bool)
    wrong, loss, gradient = _evaluate(model, start, part.labels, targets, options)
    fooled |= wrong
    state = _begin(part, start, targets, threat, loss, gradient)
    # Without a gradient at its start an image stays there for ever, so it need not be asked again.
    state.keep(gradient.flatten(1).any(1) & ~wrong)
    intervals = checkpoints(options.steps)
    for taken in range(1, options.steps + 1):
        if not len(state.rows):
            break
        moved = _step(state, threat, first=taken == 1)
        state.previous, state.images = state.images, moved
        last = taken == options.steps
        wrong, loss, gradient = _evaluate(model, moved, state.labels, state.targets, options, last=last)
        found[state.rows[wrong]] = moved[wrong]
        fooled[state.rows[wrong]] = True
        state.gradient = gradient
        _note(state, loss)
        state.keep(~wrong)
        if taken in intervals:
            _halve(state, intervals[taken])
    found[state.rows] = state.best_images
    return found, fooled


def _begin(part: Held, start: Tensor, targets: Tensor, threat: ThreatModel, loss: Tensor, gradient: Tensor) -> _State:
    everything = torch.arange(len(start), device=start.device)
    return _State(
        everything, part.images, part.labels, targets,
        torch.full_like(start.flatten(1)[:, 0], 2 * threat.eps).reshape(-1, *[1] * (start.ndim - 1)),
        start, start, gradient, loss, start.clone(), gradient.clone(), loss.clone(), loss.clone(),
        torch.zeros_like(everything), torch.ones_like(part.labels, dtype=torch.bool),
    )  # fmt: skip


def _step(state: _State, threat: ThreatModel, *, first: bool) -> Tensor:
    """Lines 3 and 7 to 8 of Algorithm 1: a projected gradient step, then momentum, projected again."""
    images = state.images
    moved = project(images + state.step * direction(state.gradient, images, threat.norm), state.clean, threat)
    if first:
        return moved
    # images + MOMENTUM (moved - images) + (1 - MOMENTUM) (images - previous), in one tensor
    moved.mul_(MOMENTUM).add_(images, alpha=2 * (1 - MOMENTUM)).sub_(state.previous, alpha=1 - MOMENTUM)
    return project(moved, state.clean, threat)


def _note(state: _State, loss: Tensor) -> None:
    """Count rises, and keep the best point where this one is better."""
    state.rises += loss > state.loss
    state.loss = loss
    better = (loss > state.best_loss).nonzero().flatten()
    state.best_images[better] = state.images[better]
    state.best_gradient[better] = state.gradient[better]
    state.best_loss[better] = loss[better]


def _halve(state: _State, interval: int) -> None:
    """Halve the steps that swing or got nowhere, and go on from the best point (lines 10 to 13 of Algorithm 1)."""
    swings = state.rises <= RISES * interval
    stands = ~state.halved & (state.checked_loss >= state.best_loss)
    state.halved = swings | stands
    state.checked_loss = state.best_loss.clone()
    state.rises.zero_()
    rows = state.halved.nonzero().flatten()
    state.step[rows] /= 2
    state.images[rows] = state.best_images[rows]
    state.gradient[rows] = state.best_gradient[rows]


def _evaluate(
    model: Classifier, images: Tensor, labels: Tensor, targets: Tensor, options: APGD, *, last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the model is wrong, the objective, both (n,), and a finite gradient like ``images``; in batches.

    Where the objective's gradient is zero or not finite, the margin's stands in. The ``last`` evaluation of a run needs
    no gradient and gets zeros, and so does a batch that is wrong throughout.
    """
    batches = slices(len(images), options.batch_size)
    found = [_batch(model, images[b], labels[b], targets[b], options.objective, last) for b in batches]
    wrong, values, gradient = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    return wrong, values, gradient


def _batch(
    model: Classifier, images: Tensor, labels: Tensor, targets: Tensor, objective: Objective, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tracked = images.detach().requires_grad_(not last)
    with torch.set_grad_enabled(not last):
        logits = model(tracked)
        values = objective(logits.double(), labels, targets)
    wrong, gradient = logits.detach().argmax(1) != labels, torch.zeros_like(images)
    if values.requires_grad and not wrong.all():
        (found,) = torch.autograd.grad(values.sum(), tracked, allow_unused=True)
        gradient = gradient if found is None else found
        dead = unusable(gradient)
        if dead.any():
            gradient[dead] = input_gradient(model, tracked[dead], labels[dead], "margin")
            gradient = torch.where(gradient.isfinite(), gradient, 0.0)
    return wrong, values.detach(), gradient
