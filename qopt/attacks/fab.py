"""FAB, the fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted adversarial examples"), targeted."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import random_start
from qopt.attacks.batches import Held, answers, attack_right, likely_classes, slices
from qopt.attacks.fab_projection import shortest_move
from qopt.attacks.gradient import LOSSES
from qopt.attacks.score import BATCH_SIZE
from qopt.errors import UsageError
from qopt.threat import Norm, ThreatModel

TOWARDS_CLEAN = 0.1
"""The largest share of a step that heads for the boundary as seen from the clean image (alpha_max)."""
OVERSHOOT = 1.05
"""How far a step goes, in shares of the way to the boundary (eta)."""
BACK = 0.9
"""What is left of a perturbation after it fooled (beta)."""
RADIUS = {"linf": 0.3, "l2": 1.0}
"""Random starts lie within half of this, of eps, or of the smallest distortion so far, whichever is least."""
SEARCH_STEPS = 3
"""Evaluations of the final search between the clean image and the best point."""


@final
@dataclass(frozen=True)
class FAB:
    """Steps to the boundary of a linearised classifier, with a pull to the clean image, and back again once across.

    Attributes:
        norm: what the distortion is measured in.
        eps: an image leaves as soon as a distortion of at most eps fooled; None to look for the smallest one.
        steps: steps of each run.
        restarts: runs for each class, the first from the clean image.
        targets: runs head for the boundary to each of so many most likely other classes (at most all of them).
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    norm: Norm = "linf"
    eps: float | None = None
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if self.norm not in RADIUS:
            raise UsageError("unknown norm", where="FAB", expected=" or ".join(RADIUS), got=repr(self.norm))
        if self.eps is not None and not (isfinite(self.eps) and self.eps >= 0):
            raise UsageError("eps must be a finite number, zero or larger", where="FAB", got=repr(self.eps))
        for option in ("steps", "restarts", "targets", "batch_size"):
            if getattr(self, option) < 1:
                raise UsageError(
                    f"{option} must be a whole number, 1 or larger", where="FAB", got=repr(getattr(self, option))
                )

    @property
    def name(self) -> str:
        """``FAB-T``; with steps and restarts where they are not 100 and 1."""
        runs = f"x{self.restarts}" if self.restarts > 1 else ""
        return "FAB-T" + (f"-{self.steps}{runs}" if runs or self.steps != 100 else "")

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int, indices: Tensor | None = None
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1]; the closest fooling point found, else the clean image."""

        def attack(held: Held) -> Tensor:
            return _runs(model, held, seed, self)

        return attack_right(model, images, labels, indices, self.batch_size, attack)

    def distortion(self, moves: Tensor) -> Tensor:
        """Lengths (n,) of ``moves`` (n, ...)."""
        rows = moves.flatten(1)
        return rows.abs().amax(1) if self.norm == "linf" else rows.norm(dim=1)


@final
@dataclass(eq=False)
class _Best:
    """The closest fooling point of each image so far, and its distortion; infinity and the clean image at first."""

    images: Tensor
    distortion: Tensor

    def offer(self, rows: Tensor, images: Tensor, fooled: Tensor, distortion: Tensor) -> None:
        """Take those of ``images`` (k, ...), made for ``rows`` (k,), that fooled and are closer than what is known."""
        closer = fooled & (distortion < self.distortion[rows])
        self.images[rows[closer]] = images[closer]
        self.distortion[rows[closer]] = distortion[closer]

    def unfinished(self, rows: Tensor, eps: float | None) -> Tensor:
        """Bool (k,): which of ``rows`` are to be attacked on."""
        return self.distortion[rows] > (-inf if eps is None else eps)


def _runs(model: Classifier, held: Held, seed: int, options: FAB) -> Tensor:
    """All classes and restarts on the images held; returns the adversarial images."""
    best = _Best(held.images.clone(), torch.full_like(held.logits[:, 0], inf))
    classes = likely_classes(held.logits, held.labels, options.targets)
    left = torch.arange(len(held.labels), device=held.labels.device)
    for column in range(classes.shape[1]):
        for restart in range(options.restarts):
            left = left[best.unfinished(left, options.eps)]
            if len(left):
                start = _start(held, best, left, seed, options, column, restart)
                known = best.distortion[left]
                _run(model, held, left, start, classes[:, column], best, options)
                closer = left[(best.distortion[left] < known) & best.unfinished(left, options.eps)]
                if len(closer):
                    _final_search(model, held, closer, best, options)
    return best.images


def _start(held: Held, best: _Best, rows: Tensor, seed: int, options: FAB, column: int, restart: int) -> Tensor:
    """Where a run on ``rows`` starts: the clean images first, then somewhere near them."""
    clean = held.images[rows]
    if not restart:
        return clean
    radius = RADIUS[options.norm] if options.eps is None else options.eps
    number = column * options.restarts + restart
    ball = ThreatModel(options.norm, radius / 2)
    start = random_start(clean, ball, seed=seed, indices=held.numbers[rows], restart=number)
    nearer = (best.distortion[rows] / max(radius, 1e-12)).clamp_max(1.0)
    return clean + _columns(nearer, clean) * (start - clean)


def _run(
    model: Classifier, held: Held, rows: Tensor, images: Tensor, targets: Tensor, best: _Best, options: FAB
) -> None:
    """One run on ``rows`` (k,) of the images held, from ``images`` (k, ...); what it finds is offered to ``best``."""
    clean, labels, targets = held.images[rows], held.labels[rows], targets[rows]
    for _ in range(options.steps):
        lead, gradient = _linearise(model, images, labels, targets, options.batch_size)
        # Without a gradient there is no boundary to head for.
        going = gradient.flatten(1).any(1) & lead.isfinite() & best.unfinished(rows, options.eps)
        if not going.all():
            rows, clean, labels, targets, images, lead, gradient = (
                tensor[going] for tensor in (rows, clean, labels, targets, images, lead, gradient)
            )
        if not len(rows):
            break
        images = _step(images, clean, lead, gradient, options)
        wrong = answers(model, images, options.batch_size).argmax(1) != labels
        moves = images - clean
        best.offer(rows, images, wrong, options.distortion(moves))
        images = torch.where(_columns(wrong, images), clean + BACK * moves, images)


def _step(images: Tensor, clean: Tensor, lead: Tensor, gradient: Tensor, options: FAB) -> Tensor:
    """Equation 9: towards the target's boundary from ``images``, and a little from ``clean`` too."""
    points, centres, normal = (tensor.flatten(1) for tensor in (images, clean, gradient))
    here = shortest_move(points, normal, -lead, options.norm)
    there = shortest_move(centres, normal, (normal * (points - centres)).sum(1) - lead, options.norm)
    near, far = (options.distortion(move).clamp_min(1e-8) for move in (here, there))
    share = (near / (near + far)).clamp_max(TOWARDS_CLEAN)[:, None]
    moved = torch.lerp(points.add(here, alpha=OVERSHOOT), centres.add(there, alpha=OVERSHOOT), share)
    return moved.clamp_(0, 1).view_as(images)


def _linearise(
    model: Classifier, images: Tensor, labels: Tensor, targets: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The lead of ``targets`` (n,) on ``labels`` (n,), and its gradient like ``images``, what is not finite zero."""
    found = [_linear_batch(model, images[b], labels[b], targets[b]) for b in slices(len(images), batch_size)]
    if len(found) == 1:
        return found[0]
    return torch.cat([lead for lead, _ in found]), torch.cat([gradient for _, gradient in found])


def _linear_batch(model: Classifier, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    tracked = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(tracked)
        lead = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    found = torch.autograd.grad(lead.sum(), tracked, allow_unused=True)[0] if lead.requires_grad else None
    if found is None:
        return lead.detach(), torch.zeros_like(images)
    return lead.detach(), found if found.isfinite().all() else torch.where(found.isfinite(), found, 0.0)


def _final_search(model: Classifier, held: Held, rows: Tensor, best: _Best, options: FAB) -> None:
    """On the way from the clean image to the best point of ``rows`` (k,), find where it begins to fool (section 2.5).

    Each evaluation is just beyond where a line through the margins at both ends crosses zero, and replaces the end of
    its side.
    """
    clean, far, labels = held.images[rows], best.images[rows].clone(), held.labels[rows]
    moves, distortion = far - clean, best.distortion[rows]
    margin, everything = LOSSES["margin"], torch.arange(len(rows), device=rows.device)
    ends = torch.stack([torch.zeros_like(distortion), torch.ones_like(distortion)])
    margins = torch.stack([margin(held.logits[rows], labels), margin(answers(model, far, options.batch_size), labels)])
    for _ in range(SEARCH_STEPS):
        crossing = -margins[0] / (margins[1] - margins[0]).clamp_min(1e-12)
        shares = torch.lerp(ends[0], ends[1], 0.01 + 0.99 * crossing.clamp(0.0, 1.0))
        images = (clean + _columns(shares, clean) * moves).clamp_(0, 1)
        logits = answers(model, images, options.batch_size)
        fooled = logits.argmax(1) != labels
        best.offer(rows, images, fooled, options.distortion(images - clean))
        side = fooled.long(), everything
        ends[side], margins[side] = shares, margin(logits, labels)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (n,) shaped to multiply ``like`` (n, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
