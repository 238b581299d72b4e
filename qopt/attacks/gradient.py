"""The core of all attacks by gradient ascent: losses, input gradients, and the loop over the images not yet fooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.ball import direction, project, random_start
from qopt.attacks.score import BATCH_SIZE, accuracy_vector, check_labels, predict
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel

LossName = Literal["cross_entropy", "margin"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds against the label, (n,): ``log sum_{j != y} exp z_j - z_y``, for logits (n, classes), labels (n,).

    Cross-entropy is its softplus, so their gradients differ by one positive factor per image, which no attack here
    keeps; that factor, ``1 - p_y``, is zero in float32 from a lead of 17 on, and takes the whole gradient with it.
    """
    return _others(logits, labels).logsumexp(1) - _own(logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, (n,): positive exactly where the prediction is wrong (Carlini & Wagner 2017, f_6)."""
    return _others(logits, labels).amax(1) - _own(logits, labels)


LOSSES: Mapping[LossName, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cross_entropy": cross_entropy, "margin": margin}
)


@final
@dataclass(frozen=True)
class Ascent:
    """Options of projected gradient ascent.

    Attributes:
        steps: gradient steps of each run, at least 1.
        step: their length in the norm of the threat model, larger than 0.
        loss: what the steps raise.
        random_start: start at a random point of the ball; otherwise at the clean image.
        restarts: runs from different random starts, at least 1; more than 1 needs a random start.
        compact: an image leaves as soon as it is fooled. Otherwise every run takes all its steps, and the last fooling
            image is returned: what mean distortions in the literature describe, and what transfers to other models.
        batch_size: images per forward pass.
    """

    steps: int
    step: float
    loss: LossName = "cross_entropy"
    random_start: bool = False
    restarts: int = 1
    compact: bool = True
    batch_size: int = BATCH_SIZE


def check_options(attack: str, loss: str, **counts: int) -> None:
    """Raise UsageError unless ``loss`` is known and every one of ``counts`` is at least 1; ``attack`` is at fault."""
    if loss not in LOSSES:
        raise UsageError("unknown loss", where=attack, expected=" or ".join(LOSSES), got=repr(loss))
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"{option} must be a whole number, 1 or larger", where=attack, got=repr(count))


def ascend(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    options: Ascent,
    *,
    seed: int,
    indices: Tensor | None,
) -> AttackResult:
    """Attack ``images`` (n, ...), float32 in [0, 1], with ``labels`` (n,), within ``threat``.

    Images the model gets wrong are returned as they are, and so is everything at eps = 0. ``fooled`` is what
    `accuracy_vector` says of the returned images, whatever happened on the way. Parameters of the model are not
    touched. The result depends on ``batch_size`` only through the rounding of the model's own arithmetic.

    Raises:
        DataError: images, labels or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    logits = predict(model, images, options.batch_size)
    labels = check_labels(labels, len(images), logits.shape[1])
    numbers = torch.arange(len(images)) if indices is None else indices
    if numbers.shape != labels.shape:
        raise DataError("indices must number the images", expected=f"{len(images)}", got=f"{tuple(numbers.shape)}")
    targets = (logits.argmax(1) == labels).nonzero().flatten()
    with torch.inference_mode(False):  # under a caller's inference mode there would be no gradients, silently
        adversarial = images.detach().clone()
        if threat.eps > 0 and len(targets):
            for chunk in torch.split(targets, options.batch_size):
                starts = _Starts(adversarial[chunk], numbers[chunk.to(numbers.device)], threat, seed, options)
                adversarial[chunk] = _attack(model, starts, labels[chunk])
    return AttackResult(adversarial, ~accuracy_vector(model, adversarial, labels, options.batch_size))


def input_gradient(model: Classifier, images: Tensor, labels: Tensor, loss: LossName) -> Tensor:
    """Gradient, like ``images`` (n, ...), of each image's loss with respect to its pixels, as autograd gives it."""
    with torch.inference_mode(False), torch.enable_grad():
        tracked = images.detach().clone().requires_grad_()
        return _gradient(model(tracked), tracked, labels.clone(), loss)


def unusable(gradient: Tensor) -> Tensor:
    """Bool (n,): whether an image's gradient, of (n, ...), is zero everywhere or not finite somewhere."""
    rows = gradient.flatten(1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)


@final
@dataclass(frozen=True, eq=False)
class _Starts:
    """The clean images of one batch and what its runs start from."""

    clean: Tensor
    numbers: Tensor
    threat: ThreatModel
    seed: int
    options: Ascent

    def of(self, rows: Tensor, restart: int) -> Tensor:
        clean = self.clean[rows]
        if not self.options.random_start:
            return clean
        numbers = self.numbers[rows.to(self.numbers.device)]
        return random_start(clean, self.threat, seed=self.seed, indices=numbers, restart=restart)


def _attack(model: Classifier, starts: _Starts, labels: Tensor) -> Tensor:
    """All restarts on one batch of images that the model gets right; returns the adversarial images."""
    best = starts.clean.clone()
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    everything = torch.arange(len(labels), device=labels.device)
    for restart in range(starts.options.restarts):
        rows = everything[~fooled] if starts.options.compact else everything
        if not len(rows):
            break
        images, success = _run(model, starts.of(rows, restart), starts.clean[rows], labels[rows], starts)
        taken = success | ~fooled[rows]
        best[rows[taken]] = images[taken]
        fooled[rows] |= success
    return best


def _run(model: Classifier, images: Tensor, clean: Tensor, labels: Tensor, starts: _Starts) -> tuple[Tensor, Tensor]:
    """One run from ``images``: the last fooling image of each, or else the last one, and whether it fooled."""
    options, threat = starts.options, starts.threat
    result, fooled = images.clone(), torch.zeros_like(labels, dtype=torch.bool)
    active = torch.arange(len(labels), device=labels.device)
    for step in range(options.steps + 1):
        tracked = images.detach().requires_grad_()
        with torch.set_grad_enabled(step < options.steps):
            logits = model(tracked)
        wrong = logits.detach().argmax(1) != labels
        result[active[wrong]] = images[wrong]
        fooled[active[wrong]] = True
        if step == options.steps or (options.compact and wrong.all()):
            break
        gradient = _usable_gradient(model, logits, tracked, labels, options.loss)
        # Without a gradient an image stays where it is for ever, so it need not be asked again.
        going = gradient.flatten(1).any(1) & ~wrong if options.compact else gradient.flatten(1).any(1)
        if not going.all():
            stuck = ~going & ~fooled[active]
            result[active[stuck]] = images[stuck]
            images, clean, labels, active, gradient = (t[going] for t in (images, clean, labels, active, gradient))
        if not len(active):
            break
        images = project(images + options.step * direction(gradient, images, threat.norm), clean, threat)
    missed = ~fooled[active]
    result[active[missed]] = images[missed]
    return result, fooled


def _usable_gradient(model: Classifier, logits: Tensor, tracked: Tensor, labels: Tensor, loss: LossName) -> Tensor:
    """The gradient of ``loss``; of the margin for images where that is zero or not finite; else zero."""
    gradient = _gradient(logits, tracked, labels, loss)
    dead = unusable(gradient)
    if loss != "margin" and dead.any():
        gradient[dead] = input_gradient(model, tracked[dead], labels[dead], "margin")
    return torch.where(gradient.isfinite(), gradient, 0.0)


def _gradient(logits: Tensor, tracked: Tensor, labels: Tensor, loss: LossName) -> Tensor:
    """Zero where no gradient leads from the logits to the images at all: a finding for the masking rules, no error."""
    if not logits.requires_grad:
        return torch.zeros_like(tracked)
    with torch.enable_grad():
        total = LOSSES[loss](logits.double(), labels).sum()
    (gradient,) = torch.autograd.grad(total, tracked, allow_unused=True)
    return torch.zeros_like(tracked) if gradient is None else gradient


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf)
